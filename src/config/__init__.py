"""Importing this package registers the schemas and the resolvers on which `conf/` builds."""

from src.config import resolvers, schema  # noqa: F401
