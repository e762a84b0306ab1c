"""Of the wheel of the compiled proxy (``make wheel``): it is for one Python and one system.

Setuptools would take it for one that is for all: the extension modules are there already.
"""

from setuptools import Distribution, setup


class Compiled(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(distclass=Compiled)
