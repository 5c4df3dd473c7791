from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-adalrs",
    version="0.1.0",
    description="GPT pretraining on DeepSpeed in which the learning rate finds itself (AdaLRS)",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_adalrs", "megatron_adalrs.*"]),
    package_data={"megatron_adalrs": ["report/*.css", "report/*.js", "report/*.html"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.5",
        "deepspeed>=0.17",
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "pydantic>=2.11",
        "tyro>=0.9.20",
        "docstring-parser>=0.16",
        "pyyaml>=6",
        "rich>=13",
        "psutil>=5.9",
        "plotly>=6",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "tqdm>=4.66",
        "ninja>=1.11",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6.100", "ruff>=0.6"],
        "hf": ["tokenizers>=0.20", "safetensors>=0.4.3", "transformers>=4.57", "protobuf"],
        "data": ["pyarrow>=15"],
        "wandb": ["wandb>=0.19"],
        "peers": ["prodigyopt>=1.1", "schedulefree>=1.4"],
    },
)
