from setuptools import find_packages, setup

# Two engines pin different torch builds: install `vllm` or `sglang`, never both in one environment.
# The CPU environment is requirements/cpu.lock (`make install`): extras cannot exclude torchvision.
EXTRAS = {
    "train": ["megatron-core>=0.16.1,<0.20", "ray[default]>=2.60,<3", "transformers>=5.16.1,<5.20"],
    "vllm": ["vllm==0.32.0"],
    "sglang": ["sglang==0.5.23"],
    "track": ["wandb>=0.20", "mlflow-skinny>=3"],
    "dev": ["pytest", "hypothesis", "ruff", "mypy", "types-PyYAML", "if-verifiable"],
}

setup(
    packages=[
        *find_packages(include=["redone", "redone.*"]),
        "redone_kernels",
        "redone_kernels.jit",
        "redone_kernels.reference",
        "redone_launcher",
    ],
    package_dir={
        "redone": "redone",
        "redone_kernels": "kernels/redone_kernels",
        "redone_launcher": "launcher/redone_launcher",
    },
    install_requires=[
        "torch>=2.13",
        "numpy",
        "safetensors",
        "xxhash",
        "gguf",
        "pydantic>=2.10",
        "omegaconf>=2.3",
        "pyyaml",
        "datasets",
        "pyarrow",
        "sacrebleu",
        "rouge-score",
        "jieba",
        "langdetect",
        "nltk",
        "jsonschema",
        "rouge==1.0.1",
        "demoji==1.1.0",  # 2.0 strips more, which moves SNS-Bench's released scores
        "tensorboard",
        "rich",
    ],
    extras_require=EXTRAS,
)
