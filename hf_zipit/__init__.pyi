# ruff: noqa: F401
"""What the face has; `__init__.py` reads it."""

from hf_zipit.adapters import register as register_adapter
from hf_zipit.align.method import register as register_method
from hf_zipit.combine.rule import register as register_rule
from hf_zipit.config import MergeConfig as MergeConfig
from hf_zipit.config import PolishConfig as PolishConfig
from hf_zipit.correct.correction import register as register_correction
from hf_zipit.data.calibration import Calibration as Calibration
from hf_zipit.data.drawn import draw_images as draw_images
from hf_zipit.data.written import write_samples as write_samples
from hf_zipit.evaluation import metrics as metrics
from hf_zipit.evaluation.measure import evaluate as evaluate
from hf_zipit.evaluation.task_data import task_datasets as task_datasets
from hf_zipit.grouping.grouping import group as group
from hf_zipit.landscapes.landscape import landscape as landscape
from hf_zipit.lora.merged import MergedAdapters as MergedAdapters
from hf_zipit.lora.merging import merge_adapters as merge_adapters
from hf_zipit.lora.rule import register as register_lora_rule
from hf_zipit.merging import merge as merge
from hf_zipit.merging import plan as plan
from hf_zipit.modeling import ZipItConfig as ZipItConfig
from hf_zipit.modeling import ZipItForAudioClassification as ZipItForAudioClassification
from hf_zipit.modeling import ZipItForCausalLM as ZipItForCausalLM
from hf_zipit.modeling import ZipItForConditionalGeneration as ZipItForConditionalGeneration
from hf_zipit.modeling import ZipItForCTC as ZipItForCTC
from hf_zipit.modeling import ZipItForDepthEstimation as ZipItForDepthEstimation
from hf_zipit.modeling import ZipItForImageClassification as ZipItForImageClassification
from hf_zipit.modeling import ZipItForMaskedLM as ZipItForMaskedLM
from hf_zipit.modeling import ZipItForObjectDetection as ZipItForObjectDetection
from hf_zipit.modeling import ZipItForQuestionAnswering as ZipItForQuestionAnswering
from hf_zipit.modeling import ZipItForSemanticSegmentation as ZipItForSemanticSegmentation
from hf_zipit.modeling import ZipItForSequenceClassification as ZipItForSequenceClassification
from hf_zipit.modeling import ZipItForTokenClassification as ZipItForTokenClassification
from hf_zipit.modeling import ZipItForVideoClassification as ZipItForVideoClassification
from hf_zipit.modeling import ZipItModel as ZipItModel
from hf_zipit.modeling.residue import register as register_residue
from hf_zipit.observation import LayerStatistics as LayerStatistics
from hf_zipit.observation import Moments as Moments
from hf_zipit.observation import gather_statistics as gather_statistics
from hf_zipit.observation import observe as observe
from hf_zipit.polish.kind import register as register_training
from hf_zipit.recipe.loading import load_recipe as load_recipe
from hf_zipit.refit import RefitConfig as RefitConfig
from hf_zipit.report.costs import expected_costs as expected_costs
from hf_zipit.residues.routing import register as register_router
from hf_zipit.running.run import run_recipe as run_recipe
from hf_zipit.searching import search as search
from hf_zipit.symmetry import MergeSpec as MergeSpec
from hf_zipit.symmetry import prove as prove

__version__: str
__all__: list[str]
