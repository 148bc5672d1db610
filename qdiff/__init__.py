"""Post-training quantization of diffusion models: Q-Diffusion (Li et al., ICCV 2023)."""

from qdiff.calibrate import calibrate
from qdiff.calibration_data import CalibrationSet, get_train_samples, load_calibration_set
from qdiff.checkpoint import CheckpointError, load_quantized, resume_cali_model, save_packed, save_published
from qdiff.config import CalibrationConfig, QuantConfig, QuantizerConfig
from qdiff.output_scale import OutputScale
from qdiff.published import block_reconstruction, layer_reconstruction
from qdiff.quant_block import BaseQuantBlock
from qdiff.quant_layer import QuantModule, SplitQuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizers import AdaRoundQuantizer, UniformAffineQuantizer
from qdiff.reconstruction import reconstruct_activations, reconstruct_weights
from qdiff.scale_correction import fit_output_scale
from qdiff.version import __version__

__all__ = [
    "AdaRoundQuantizer",
    "BaseQuantBlock",
    "CalibrationConfig",
    "CalibrationSet",
    "CheckpointError",
    "OutputScale",
    "QuantConfig",
    "QuantModel",
    "QuantModule",
    "QuantizerConfig",
    "SplitQuantModule",
    "UniformAffineQuantizer",
    "__version__",
    "block_reconstruction",
    "calibrate",
    "fit_output_scale",
    "get_train_samples",
    "layer_reconstruction",
    "load_calibration_set",
    "load_quantized",
    "reconstruct_activations",
    "reconstruct_weights",
    "resume_cali_model",
    "save_packed",
    "save_published",
]
