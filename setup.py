"Packaging reads its facts from settings.ini, which nbdev reads too: one place for versions and requirements."
from configparser import ConfigParser
from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(name=cfg['lib_name'], version=cfg['version'], license=cfg['license'].upper(), description=cfg['description'],
      author=cfg['author'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
      long_description=open('README.md', encoding='utf-8').read(), long_description_content_type='text/markdown',
      packages=find_packages(include=['asamoe', 'asamoe.*']), package_data={'asamoe': ['weights/*/*']},
      python_requires=f">={cfg['min_python']}", install_requires=cfg['requirements'].split(),
      extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('lab', 'gpu', 'onnx', 'deepinv', 'peers')} | {'dev': f"{cfg['dev_requirements']} {cfg['onnx_requirements']}".split()},
      entry_points={'console_scripts': ['asamoe=asamoe.cli:main']})
