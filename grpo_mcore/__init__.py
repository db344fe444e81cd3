"""GRPO training of language models: a Megatron-Core policy and vLLM rollouts, from a laptop's CPU to a cluster.

A stage has one word; its room (a folder), its timer, its metrics and its tests bear it. `python -m grpo_mcore` prints
the house, and tests/test_layers.py holds it, both from what stands here and in the rooms' own docstrings: the first
sentence, `Doors:` the modules that other rooms, launch/ and benchmarks/ may import, `Uses:` the rooms it imports.

Floors, from the top down; no import runs up, and none in a circle:

    plan stages
    trainer run
    entry evaluate
    refit checkpoint
    policy
    loss rollout
    environment
    parallel report data
    kernels config reward types

Blind to each other: kernels and parallel.

Libraries, and the rooms or modules where they are at home:

    torch.distributed  parallel checkpoint refit.weight_transfer
    triton             kernels
    vllm               rollout.engine refit.senders refit.live_weights refit.receiver
    ray                rollout.engines rollout.placement
    megatron           parallel policy checkpoint
    transformers       data policy checkpoint.parity environment.environment_process
    huggingface_hub    data.hub policy.model_folder

Pure modules, and all that they import beside the standard library and their own room's pure modules:

    rollout.dispatch
    rollout.admission
    reward.channel          psutil
    reward.killable         psutil
    reward.function_process psutil
    reward.functions        config types
    reward.rewards          config types
    reward.line_answer
    reward.graded           types
    reward.shaping          torch config types
    reward.math_answer
    reward.math_spelling
    reward.math_structure
    reward.math_number
    reward.math_formula     math_verify sympy
    reward.boxed_answer     sympy latex2sympy2_extended
    reward.verifiers
    reward.grading_process  psutil
    reward.grader           config
    environment.tools
    loss.advantage          torch config types
    loss.loss               torch config types
    evaluate.scores
    report.run_folder       yaml config
    report.curves           matplotlib
    report.report           yaml config
"""
