"""The public names. `from fasterai_sparse.all import *` brings these and nothing of fastai's, so it stands beside
fastai's own star import, before or after it. Everything else is reached through its module."""
from .core.allocation import erdos_renyi_sparsity, first_layer_dense_uniform, uniform_sparsity
from .core.criteria import (
    Criteria, grad_crit, large_final, large_init, large_init_large_final, magnitude, magnitude_increase, movement,
    movmag, Normalizer, random_criteria, Reducer, small_final, small_init, small_init_small_final, squared_final,
    updating_magnitude_increase, updating_movement, updating_movmag, wanda)
from .core.from_zeros import masks_from_zeros
from .core.granularity import Granularities
from .core.masks import apply_masks, get_mask, masked_params, set_mask
from .core.patterns import block, NM
from .core.report import plot_sparsity, sparsity_report
from .core.schedules import agp, cos, dsd, iterative, lin, one_cycle, one_shot, Schedule
from .core.select import top_k_mask
from .core.sparsifier import Sparsifier
from .core.targets import as_fraction
from .train.bn_adaptation import adapt_batchnorm, AdaptBatchNorm
from .train.keep_masks import copy_masks, KeepMasks
from .train.opt_state import clear_opt_state
from .train.sparsify_callback import SparsifyCallback
from .train.updates import bake_masks
from .dynamic.callback import (
    DynamicSparseTrainingCallback, GraNet_presets, ITOP_presets, MEST_presets, RigL_presets, SET_presets, SNFS_presets)
from .dynamic.drop_grow import DropGrow, gradient_magnitude, gradient_momentum, random_score, weight_magnitude
from .dynamic.random_masks import (
    is_sparseable_module, maybe_float, sparse_mask, sparse_mask_like, sparse_params, sparseable_modules, sparsify_model)
from .nncf.config import callbacks_from_config, SparsityConfig
from .nncf.const import ConstSparsityCallback
from .nncf.magnitude import MagnitudeSparsityCallback
from .nncf.rb import RBSparsityCallback
from .nm.permute_model import permute_model
from .nm.search import permutation_backends, search_permutation
from .nm.search_cuda import asp_search
from .nm.verify import prune_trained_model, verify_nm
from .engine.accelerate import accelerate
from .engine.modules import Accelerated, Layerwise, SparseConv2d, SparseLinear
from .engine.semi_structured import accelerate_cuda
from .files.onnx import export_onnx
from .files.safetensors import load_sparse, save_sparse

__all__ = [
    # core: sparsify a model in one shot
    'Sparsifier', 'masks_from_zeros', 'sparsity_report', 'plot_sparsity',
    'get_mask', 'set_mask', 'apply_masks', 'masked_params', 'top_k_mask', 'as_fraction',
    'Granularities', 'block', 'NM',
    'Criteria', 'Reducer', 'Normalizer', 'random_criteria', 'magnitude', 'large_final', 'squared_final', 'small_final',
    'large_init', 'small_init', 'large_init_large_final', 'small_init_small_final',
    'magnitude_increase', 'movement', 'movmag',
    'updating_magnitude_increase', 'updating_movement', 'updating_movmag', 'wanda', 'grad_crit',
    'uniform_sparsity', 'first_layer_dense_uniform', 'erdos_renyi_sparsity',
    'Schedule', 'one_shot', 'iterative', 'agp', 'one_cycle', 'cos', 'lin', 'dsd',
    # train: a schedule in a fastai fit, and zeros that stay
    'SparsifyCallback', 'KeepMasks', 'bake_masks', 'copy_masks', 'adapt_batchnorm', 'AdaptBatchNorm', 'clear_opt_state',
    # dynamic: sparse from the first step
    'sparsify_model', 'sparse_mask', 'sparse_mask_like', 'maybe_float', 'sparse_params', 'is_sparseable_module',
    'sparseable_modules',
    'DynamicSparseTrainingCallback', 'SET_presets', 'SNFS_presets', 'RigL_presets', 'ITOP_presets', 'GraNet_presets',
    'MEST_presets', 'DropGrow', 'random_score', 'weight_magnitude', 'gradient_magnitude', 'gradient_momentum',
    # nncf: its algorithms and its configuration files
    'RBSparsityCallback', 'MagnitudeSparsityCallback', 'ConstSparsityCallback',
    'SparsityConfig', 'callbacks_from_config',
    # nm: the N:M pattern
    'prune_trained_model', 'permute_model', 'search_permutation', 'permutation_backends', 'asp_search',
    'verify_nm',
    # engine: inference that skips zeros
    'accelerate', 'Accelerated', 'Layerwise', 'SparseLinear', 'SparseConv2d', 'accelerate_cuda',
    # files: sparse models on disk
    'save_sparse', 'load_sparse', 'export_onnx',
]
