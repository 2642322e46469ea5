"""A pruned model, its unpruned teacher and a mix of texts in, healed weights out, as an overlay like a repair's.

Repairs fit a few weights in closed form or a few layers at a time.  Healing trains all kept layers on what the unpruned
model says of the next token.  It starts from what a repair left.
"""
