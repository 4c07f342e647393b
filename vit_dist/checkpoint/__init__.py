"""Checkpoints: `snapshot` copies the state to host memory, `writer` writes it behind the training's back, `store`
makes it a committed folder that is whole or not there, `load` brings it back, also into another strategy.
"""
