"""What trainings, rollouts and evaluations are given: vectors, pools, devices, model folders.

May import ``options`` and ``lever_data``; never another folder of lever_train.
"""
