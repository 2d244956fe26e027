"use strict";
// What the board does in the browser beside page.js: keys, and figures that follow the store.
(() => {
  const KEYS = [
    ["← or k", "the one before (query, page)"], ["→ or j", "the next one"],
    ["/", "go to the first field"], ["?", "this list"],
  ];
  const typing = (at) => at.closest("input, textarea, select, [contenteditable]");
  const follow = (rel) => document.querySelector(`a[rel="${rel}"]`)?.click();

  function help() {
    const list = document.createElement("dl");
    for (const [key, words] of KEYS) {
      const [dt, dd] = ["dt", "dd"].map((tag) => document.createElement(tag));
      const kbd = document.createElement("kbd");
      kbd.textContent = key;
      dt.append(kbd);
      dd.textContent = words;
      list.append(dt, dd);
    }
    const dialog = document.createElement("dialog");
    dialog.setAttribute("aria-label", "Keys");
    const close = document.createElement("button");
    close.textContent = "Close";
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    dialog.append(list, close);
    document.body.append(dialog);
    dialog.showModal();
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    if (event.target.closest(".sideways, pre") && event.key.startsWith("Arrow")) return;
    if (event.key === "ArrowLeft" || event.key === "k") follow("prev");
    else if (event.key === "ArrowRight" || event.key === "j") follow("next");
    else if (event.key === "/") document.querySelector("main input:not([type=hidden]), main select, main textarea")?.focus();
    else if (event.key === "?") help();
    else return;
    event.preventDefault();
  });

  // A page that follows the store asks for itself again, and takes the charts that changed.
  const every = +document.querySelector("[data-follow]")?.dataset.follow;
  async function again() {
    try {
      const answer = await fetch(location.href);
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const [ours, theirs] = [document, fresh].map((d) => [...d.querySelectorAll("[data-chart]")]);
      if (ours.length !== theirs.length) return location.reload();
      const changed = ours.filter((one, i) => one.dataset.chart !== theirs[i].dataset.chart);
      ours.forEach((one, i) => { one.dataset.chart = theirs[i].dataset.chart; });
      if (changed.length) document.dispatchEvent(new Event("lever:figures"));
    } catch { /* the server is gone: the page stays as it was */ }
    setTimeout(again, every);
  }
  if (every) setTimeout(again, every);

  // Parts that are still being made come by themselves; the rest of the page stays as it is.
  async function complete() {
    const awaited = document.querySelector("[data-awaited]");
    if (!awaited) return;
    try {
      const answer = await fetch(location.href);
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const part of document.querySelectorAll("[data-part]")) {
        const other = fresh.getElementById(part.id);
        if (other && other.outerHTML !== part.outerHTML) part.replaceWith(other);
      }
    } catch { return; /* the server is gone */ }
    setTimeout(complete, +awaited.dataset.awaited);
  }
  setTimeout(complete, 1000);
})();
