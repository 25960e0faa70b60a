"""Registers the models with transformers' Auto classes; importing `hf_rsheat` does it."""

from functools import cache
from typing import Any


@cache
def register() -> None:
    """Make AutoConfig, AutoModel*, AutoBackbone and AutoImageProcessor know our model types. Safe to call again."""
    import transformers

    from hf_rsheat.models import image_processing_pil_rs4d as rs4d_pil
    from hf_rsheat.models import image_processing_pil_rs_vheat as rs_vheat_pil
    from hf_rsheat.models import image_processing_pil_selective_mae as selective_mae_pil
    from hf_rsheat.models import image_processing_pil_vheat as vheat_pil
    from hf_rsheat.models import image_processing_rs4d as rs4d_torchvision
    from hf_rsheat.models import image_processing_rs_vheat as rs_vheat_torchvision
    from hf_rsheat.models import image_processing_selective_mae as selective_mae_torchvision
    from hf_rsheat.models import image_processing_vheat as vheat_torchvision
    from hf_rsheat.models import modeling_heat_upernet as upernet
    from hf_rsheat.models import modeling_rs4d as rs4d
    from hf_rsheat.models import modeling_rs4d_distillation as distillation
    from hf_rsheat.models import modeling_rs4d_instances as instances
    from hf_rsheat.models import modeling_rs_vheat as rs_vheat
    from hf_rsheat.models import modeling_selective_mae as selective_mae
    from hf_rsheat.models import modeling_slim_dinov2 as dinov2
    from hf_rsheat.models import modeling_vheat as vheat

    def add(config: type, *processors: type, **models: type) -> None:
        """Register a configuration, its image processors (torchvision, Pillow), and the model of each Auto class."""
        transformers.AutoConfig.register(config.model_type, config)  # type: ignore[attr-defined]
        for auto_class, model in models.items():
            getattr(transformers, auto_class).register(config, model)
        if processors:
            backends: Any = dict(zip(("torchvision", "pil"), processors, strict=True))
            transformers.AutoImageProcessor.register(config, image_processor_classes=backends)

    add(
        vheat.VHeatConfig,
        vheat_torchvision.VHeatImageProcessor,
        vheat_pil.VHeatImageProcessorPil,
        AutoModel=vheat.VHeatModel,
        AutoModelForImageClassification=vheat.VHeatForImageClassification,
        AutoBackbone=vheat.VHeatBackbone,
    )
    add(
        rs_vheat.RSVHeatConfig,
        rs_vheat_torchvision.RSVHeatImageProcessor,
        rs_vheat_pil.RSVHeatImageProcessorPil,
        AutoModel=rs_vheat.RSVHeatModel,
        AutoModelForImageClassification=rs_vheat.RSVHeatForImageClassification,
        AutoModelForPreTraining=rs_vheat.RSVHeatForPreTraining,
        AutoBackbone=rs_vheat.RSVHeatBackbone,
    )
    add(
        upernet.HeatUperNetConfig,
        AutoModelForSemanticSegmentation=upernet.HeatUperNetForSemanticSegmentation,
    )
    add(
        selective_mae.SelectiveMAEConfig,
        selective_mae_torchvision.SelectiveMAEImageProcessor,
        selective_mae_pil.SelectiveMAEImageProcessorPil,
        AutoModel=selective_mae.SelectiveMAEModel,
        AutoModelForImageClassification=selective_mae.SelectiveMAEForImageClassification,
        AutoModelForPreTraining=selective_mae.SelectiveMAEForPreTraining,
        AutoBackbone=selective_mae.SelectiveMAEBackbone,
    )
    add(
        rs4d.RS4DConfig,
        rs4d_torchvision.RS4DImageProcessor,
        rs4d_pil.RS4DImageProcessorPil,
        AutoModel=rs4d.RS4DModel,
        AutoModelForImageClassification=rs4d.RS4DForImageClassification,
        AutoModelForPreTraining=distillation.RS4DForDistillation,
        AutoBackbone=rs4d.RS4DBackbone,
    )
    add(
        instances.RS4DInstanceConfig,
        rs4d_torchvision.RS4DImageProcessor,
        rs4d_pil.RS4DImageProcessorPil,
        AutoModelForInstanceSegmentation=instances.RS4DForInstanceSegmentation,
        # The class that pipeline("image-segmentation") looks for.
        AutoModelForImageSegmentation=instances.RS4DForInstanceSegmentation,
    )
    add(
        dinov2.SlimDinov2Config,
        transformers.BitImageProcessor,
        transformers.BitImageProcessorPil,
        AutoModel=dinov2.SlimDinov2Model,
        AutoModelForImageClassification=dinov2.SlimDinov2ForImageClassification,
        AutoBackbone=dinov2.SlimDinov2Backbone,
    )
