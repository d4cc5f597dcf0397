"""kvcomp in Hugging Face transformers; importing it registers the attention "kvcomp"."""

try:
    from kvcomp.integrations.transformers.cache import KVCompCache
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError("KVCompCache needs transformers: pip install '.[hf]'", name=error.name) from None

__all__ = ["KVCompCache"]
