"""Hub-ready folders: weights, config, image processor, remote code and card; and checks that they are what they say."""

from hf_rsheat.hub.export import export, export_folder, load_folder
from hf_rsheat.hub.verify import from_pretrained_verified, verify

__all__ = ["export", "export_folder", "from_pretrained_verified", "load_folder", "verify"]
