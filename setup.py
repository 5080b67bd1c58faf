from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["redone", "redone.*"]) + ["redone_kernels", "redone_launcher"],
    package_dir={
        "redone": "redone",
        "redone_kernels": "kernels/redone_kernels",
        "redone_launcher": "launcher/redone_launcher",
    },
)
