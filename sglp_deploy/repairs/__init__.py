"""A pruned model and calibration rows in, weights that make up for the removed layers out, as an overlay.

A repair is one file with one class.  Its name stands in :data:`sglp_deploy.repairs.registry.REPAIRS`.  None adds an
operator or a parameter, so every runtime still loads the model.
"""
