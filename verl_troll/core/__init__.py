"""The mathematics, using only torch and Triton. It does not depend on verl or on the rest of this package.

From logits to loss, a token passes these modules in order; each imports only earlier ones:

    kernels      the heavy operations in torch and Triton, and the constants that both share
    logits       what is read from logits and written back
    lm_head      logits that a head computes as they are read
    vocab        the same for a vocabulary that is split over ranks
    support      the ids kept of a policy
    wire         how the old policy's support travels to the update
    comparison   old and new policy on common outcomes
    projection   moving the new policy into the trust region around the old one
    loss         log-ratio, regression term, loss
"""
