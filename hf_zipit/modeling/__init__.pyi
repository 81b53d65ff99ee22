"""What the package has; `__init__.py` reads it."""

from hf_zipit.modeling.base import ZipItPreTrainedModel as ZipItPreTrainedModel
from hf_zipit.modeling.base import module_names as module_names
from hf_zipit.modeling.configuration import ZipItConfig as ZipItConfig
from hf_zipit.modeling.heads import ZipItForAudioClassification as ZipItForAudioClassification
from hf_zipit.modeling.heads import ZipItForCausalLM as ZipItForCausalLM
from hf_zipit.modeling.heads import ZipItForConditionalGeneration as ZipItForConditionalGeneration
from hf_zipit.modeling.heads import ZipItForCTC as ZipItForCTC
from hf_zipit.modeling.heads import ZipItForDepthEstimation as ZipItForDepthEstimation
from hf_zipit.modeling.heads import ZipItForImageClassification as ZipItForImageClassification
from hf_zipit.modeling.heads import ZipItForMaskedLM as ZipItForMaskedLM
from hf_zipit.modeling.heads import ZipItForObjectDetection as ZipItForObjectDetection
from hf_zipit.modeling.heads import ZipItForQuestionAnswering as ZipItForQuestionAnswering
from hf_zipit.modeling.heads import ZipItForSemanticSegmentation as ZipItForSemanticSegmentation
from hf_zipit.modeling.heads import ZipItForSequenceClassification as ZipItForSequenceClassification
from hf_zipit.modeling.heads import ZipItForTokenClassification as ZipItForTokenClassification
from hf_zipit.modeling.heads import ZipItForVideoClassification as ZipItForVideoClassification
from hf_zipit.modeling.heads import ZipItModel as ZipItModel
from hf_zipit.modeling.heads import ZipItWriter as ZipItWriter
from hf_zipit.modeling.heads import build as build
from hf_zipit.modeling.heads import merged_class as merged_class

__all__: list[str]
