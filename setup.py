"""Package metadata. pyproject.toml holds tool settings only."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SCRIPTS = ["train_tokenizer", "pretrain", "sft", "dpo", "generate"]


class WithScripts(build_py):
    """Puts copies of the flat scripts into a wheel; see nanophi/installed.py."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, "nanophi", "scripts")
            folder.mkdir(parents=True, exist_ok=True)
            for name in SCRIPTS:
                shutil.copy(HERE / f"{name}.py", folder)


plot = ["matplotlib>=3.8"]
zst = ["backports.zstd; python_version < '3.14'"]
parquet = ["pyarrow"]
serve = ["starlette>=0.49", "uvicorn>=0.38"]
oracles = ["transformers>=4.57", "tokenizers>=0.22", "trl>=1.0", "openai>=2", "gguf>=0.17"]
examples = ["langchain-core>=1.0"]  # lm-eval and ray are large: their tests skip without them
llama_cpp = ["xllamacpp; platform_system == 'Linux' and platform_machine == 'x86_64'"]

setup(
    name="nanophi",
    version="0.1.0",
    description="Phi2-mini-Chinese rebuilt from scratch: "
    "raw Chinese text to a chat model in code one person can read",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["nanophi", "nanophi.*"]),
    cmdclass={"build_py": WithScripts},
    entry_points={
        "console_scripts": [
            f"nanophi-{name.replace('_', '-')} = nanophi.installed:{name}" for name in SCRIPTS
        ]
    },
    package_data={"nanophi": ["py.typed", "infer/page.html"]},
    install_requires=[
        "torch>=2.9",
        "numpy>=2.0",
        "regex",
        "safetensors",
        "opencc",
        "sentencepiece",
        "tqdm",
    ],
    extras_require={
        "plot": plot,
        "zst": zst,
        "parquet": parquet,
        "serve": serve,
        "examples": examples,
        "test": [
            *("pytest>=8", "pytest-cov>=6", "pytest-xdist>=3.6", "hypothesis>=6", "ruff", "mypy"),
            *(*oracles, *examples, *llama_cpp, *plot, *zst, *parquet, *serve),
        ],
    },
)
