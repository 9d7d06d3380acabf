"Packaging reads its facts from settings.ini, which nbdev reads too: one place for versions and requirements."
from configparser import ConfigParser
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
end = '_requirements'                               # `lab_requirements` is what the extra `lab` needs

setup(
    name=cfg['lib_name'], version=cfg['version'], license=cfg['license'].upper(), description=cfg['description'],
    author=cfg['author'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
    long_description=open('README.md', encoding='utf-8').read(), long_description_content_type='text/markdown',
    classifiers=[
        'Development Status :: 3 - Alpha', 'Intended Audience :: Developers', 'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3', 'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12', 'Programming Language :: Python :: 3.13',
        'Framework :: Jupyter', 'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Processing', 'Typing :: Typed'],
    packages=find_packages(include=['asamoe', 'asamoe.*']),
    package_data={'asamoe': ['weights/*/*', 'grid/Snakefile', 'grid/*/config.yaml', 'py.typed']},
    python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
    extras_require={name.removesuffix(end): cfg[name].split() for name in cfg if name.endswith(end)},
    entry_points={'console_scripts': ['asamoe=asamoe.__main__:main']})
