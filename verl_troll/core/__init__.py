"""The mathematics, on torch and Triton alone. It knows neither verl nor the rest of this package.

A token goes from logits to loss in this order, and each module imports earlier ones only:

    kernels      the heavy operations in torch and Triton, and the constants that both share
    logits       what is read from logits and written back
    lm_head      logits that a head computes where they are read
    vocab        the same over a vocabulary that is split over ranks
    support      the ids kept of a policy; old and new policy on common outcomes
    wire         how the old policy's support travels to the update
    projection   the new policy moved into the trust region around the old one
    loss         log-ratio, regression term, loss
"""
