"""Registers the models with transformers' Auto classes; importing `hf_rsheat` does it."""

from functools import cache


@cache
def register() -> None:
    """Make AutoConfig, AutoModel*, AutoBackbone and AutoImageProcessor know our model types. Safe to call again."""
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForPreTraining,
        AutoModelForSemanticSegmentation,
    )

    from hf_rsheat.models import configuration_heat_upernet as upernet_configuration
    from hf_rsheat.models import configuration_rs_vheat, configuration_vheat, modeling_rs_vheat, modeling_vheat
    from hf_rsheat.models import image_processing_pil_rs_vheat as rs_vheat_pil
    from hf_rsheat.models import image_processing_pil_vheat as vheat_pil
    from hf_rsheat.models import image_processing_rs_vheat as rs_vheat_torchvision
    from hf_rsheat.models import image_processing_vheat as vheat_torchvision
    from hf_rsheat.models import modeling_heat_upernet as upernet

    vheat_config, rs_vheat_config = configuration_vheat.VHeatConfig, configuration_rs_vheat.RSVHeatConfig
    upernet_config = upernet_configuration.HeatUperNetConfig
    for config in (vheat_config, rs_vheat_config, upernet_config):
        AutoConfig.register(config.model_type, config)
    AutoModel.register(vheat_config, modeling_vheat.VHeatModel)
    AutoModel.register(rs_vheat_config, modeling_rs_vheat.RSVHeatModel)
    AutoModelForImageClassification.register(vheat_config, modeling_vheat.VHeatForImageClassification)
    AutoModelForImageClassification.register(rs_vheat_config, modeling_rs_vheat.RSVHeatForImageClassification)
    AutoModelForPreTraining.register(rs_vheat_config, modeling_rs_vheat.RSVHeatForPreTraining)
    AutoModelForSemanticSegmentation.register(upernet_config, upernet.HeatUperNetForSemanticSegmentation)
    AutoBackbone.register(vheat_config, modeling_vheat.VHeatBackbone)
    AutoBackbone.register(rs_vheat_config, modeling_rs_vheat.RSVHeatBackbone)
    processors = {
        vheat_config: (vheat_torchvision.VHeatImageProcessor, vheat_pil.VHeatImageProcessorPil),
        rs_vheat_config: (rs_vheat_torchvision.RSVHeatImageProcessor, rs_vheat_pil.RSVHeatImageProcessorPil),
    }
    for config_class, (torchvision_class, pil_class) in processors.items():
        AutoImageProcessor.register(
            config_class, image_processor_classes={"torchvision": torchvision_class, "pil": pil_class}
        )
    _register_selective_mae()
    _register_rs4d()
    _register_rs4d_instances()
    _register_slim_dinov2()


def _register_selective_mae() -> None:
    import transformers

    from hf_rsheat.models import image_processing_pil_selective_mae as pil
    from hf_rsheat.models import image_processing_selective_mae as torchvision
    from hf_rsheat.models import modeling_selective_mae as modeling

    config = modeling.SelectiveMAEConfig
    transformers.AutoConfig.register(config.model_type, config)
    transformers.AutoModel.register(config, modeling.SelectiveMAEModel)
    transformers.AutoModelForImageClassification.register(config, modeling.SelectiveMAEForImageClassification)
    transformers.AutoModelForPreTraining.register(config, modeling.SelectiveMAEForPreTraining)
    transformers.AutoBackbone.register(config, modeling.SelectiveMAEBackbone)
    backends: dict[str, type] = {
        "torchvision": torchvision.SelectiveMAEImageProcessor,
        "pil": pil.SelectiveMAEImageProcessorPil,
    }
    transformers.AutoImageProcessor.register(config, image_processor_classes=backends)


def _register_rs4d() -> None:
    import transformers

    from hf_rsheat.models import image_processing_pil_rs4d as pil
    from hf_rsheat.models import image_processing_rs4d as torchvision
    from hf_rsheat.models import modeling_rs4d as modeling
    from hf_rsheat.models.modeling_rs4d_distillation import RS4DForDistillation

    config = modeling.RS4DConfig
    transformers.AutoConfig.register(config.model_type, config)
    transformers.AutoModel.register(config, modeling.RS4DModel)
    transformers.AutoModelForImageClassification.register(config, modeling.RS4DForImageClassification)
    transformers.AutoModelForPreTraining.register(config, RS4DForDistillation)
    transformers.AutoBackbone.register(config, modeling.RS4DBackbone)
    backends: dict[str, type] = {"torchvision": torchvision.RS4DImageProcessor, "pil": pil.RS4DImageProcessorPil}
    transformers.AutoImageProcessor.register(config, image_processor_classes=backends)


def _register_rs4d_instances() -> None:
    import transformers

    from hf_rsheat.models import image_processing_pil_rs4d as pil
    from hf_rsheat.models import image_processing_rs4d as torchvision
    from hf_rsheat.models import modeling_rs4d_instances as modeling

    config = modeling.RS4DInstanceConfig
    transformers.AutoConfig.register(config.model_type, config)
    transformers.AutoModelForInstanceSegmentation.register(config, modeling.RS4DForInstanceSegmentation)
    # The class that pipeline("image-segmentation") looks for.
    transformers.AutoModelForImageSegmentation.register(config, modeling.RS4DForInstanceSegmentation)
    backends: dict[str, type] = {"torchvision": torchvision.RS4DImageProcessor, "pil": pil.RS4DImageProcessorPil}
    transformers.AutoImageProcessor.register(config, image_processor_classes=backends)


def _register_slim_dinov2() -> None:
    import transformers

    from hf_rsheat.models import modeling_slim_dinov2 as modeling

    config = modeling.SlimDinov2Config
    transformers.AutoConfig.register(config.model_type, config)
    transformers.AutoModel.register(config, modeling.SlimDinov2Model)
    transformers.AutoModelForImageClassification.register(config, modeling.SlimDinov2ForImageClassification)
    transformers.AutoBackbone.register(config, modeling.SlimDinov2Backbone)
    backends: dict[str, type] = {
        "torchvision": transformers.BitImageProcessor,
        "pil": transformers.BitImageProcessorPil,
    }
    transformers.AutoImageProcessor.register(config, image_processor_classes=backends)
