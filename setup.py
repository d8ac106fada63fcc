"""What pyproject.toml cannot say: every subpackage, and the presets, which lie beside the package, as one more of them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastgpt", "fastgpt.*"]), "fastgpt.configs"],
    package_dir={"fastgpt.configs": "configs"},
    package_data={
        "fastgpt": ["py.typed"],
        "fastgpt.configs": ["*.toml"],
        "fastgpt.data": ["gpt2/*"],
        "fastgpt.doctor.checks": ["*.toml"],
        "fastgpt.doctor.reading": ["*.toml"],
        "fastgpt.doctor.report": ["*.jinja"],
        "fastgpt.hardware": ["*.toml"],
        "fastgpt.kernels": ["tables/*.json"],
        "fastgpt.performance": ["*.toml"],
        "fastgpt.templates": ["*.jinja", "*.css"],
    },
)
