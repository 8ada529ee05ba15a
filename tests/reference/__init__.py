"""Float64 NumPy transcriptions of the published algorithms, written from the papers, not from the package.

Nothing here imports `gradientless`. Each module names its source; where the source leaves a choice open, the module
docstring says "Reads the source as: ...". The modules favour the look of the printed pseudo-code over speed.

    noise        Philox4x32-10 and the noise built on it
    gld          Gradientless Descent, Algorithms 1 and 2 of the thesis
    options      Algorithm 2 again, by the letter of its listing
    pooled       Algorithm 1 again, on one pool with a norm penalty
    gldsearch    the original GLD-Search over the whole vector
    stp, smtp    stochastic three points, without and with momentum
    fisher       the D_alpha importance estimate and the Fisher diagonal by gradients
    schedules    multipliers of a radius or a learning rate
    first_order  SGD, momentum, Nesterov, Adam, AdamW

Every optimizer module has two functions of the same arguments:

    trace(params, loss, steps, **options) -> list[State]      one State a step (see the module's State)
    run(params, loss, steps, **options) -> list[dict]         the committed parameters alone, State.params of each

`params` is a dict from tensor name to array, in parameter order; it is never changed. `loss(params, t)` is the
objective on the batch of step t, and `t` counts from 0. `schedule(t)` multiplies the radius at step t.

`options` and `pooled` follow the printed text alone, independently of `gld`, so that a misreading is not shared. They
have `trace` alone, and take their directions from a function, so that any noise can be given to them.
"""
