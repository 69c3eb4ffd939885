"""Where this package touches lmms-eval: its command line, the building of a model, an evaluation and its files."""

from __future__ import annotations

from functools import partial

from vtp_plugin.contract import TouchPoint
from vtp_plugin.hosts.compatibility import LMMS_EVAL

_At = partial(TouchPoint, LMMS_EVAL)

COMMAND_LINE = (
    _At("lmms_eval.__main__", "the flags", has=("cli_evaluate", "parse_eval_args", "argparse")),
    _At("lmms_eval.__main__:parse_eval_args", "the flags", says=("ArgumentParser", "--config", "--model_args")),
    _At("lmms_eval.__main__:cli_evaluate_single", "one evaluation", takes=("args",)),
    _At("lmms_eval.__main__:cli_evaluate", "one evaluation after the other", says=("cli_evaluate_single",)),
    _At("lmms_eval.cli.dispatch:main", "every way to the command line", says=("cli_evaluate",)),
    _At("lmms_eval.utils:simple_parse_args_string", "model arguments", takes=("args_string",)),
)
TASKS = (
    _At("lmms_eval.tasks:TaskManager.initialize_tasks", "our tasks", takes=("include_path", "include_defaults")),
    _At("lmms_eval.tasks:TaskManager", "names of tasks", takes=("verbosity", "model_name"), has=("all_tasks",)),
)
MODELS = (
    _At(
        "lmms_eval.api.model:lmms.create_from_arg_string",
        "models that ask for pruning",
        takes=("arg_string", "additional_config"),
    ),
    _At("lmms_eval.models:MODEL_REGISTRY_V2", "names of models", has=("list_canonical_model_ids", "get_manifest")),
    _At(
        "lmms_eval.models.registry_v2:ModelManifest",
        "names of models",
        takes=("model_id", "simple_class_path", "chat_class_path"),
    ),
    _At("lmms_eval.models:list_available_models", "names of models", takes=("include_aliases",)),
)
EVALUATION = (
    _At("lmms_eval.evaluator:evaluate", "the run", takes=("lm", "task_dict", "response_cache")),
    _At("lmms_eval.evaluator:simple_evaluate", "the run", says=("create_from_arg_string", "evaluate")),
    _At("lmms_eval.evaluator_utils:get_task_list", "tasks to perturb", takes=("task_dict",)),
    _At(
        "lmms_eval.api.model:lmms",
        "the questions",
        has=("generate_until", "loglikelihood", "generate_until_multi_round"),
    ),
    _At("lmms_eval.api.instance:Instance", "which question", has=("task_name", "doc_id")),
    _At(
        "lmms_eval.caching.response_cache:ResponseCache.__init__",
        "answers of other configurations",
        says=("_model_fingerprint_hash",),
    ),
    _At("lmms_eval.models.model_utils.gen_metrics:log_metrics", "times to first token"),
    _At("lmms_eval.models.model_utils.gen_metrics:get_logged_metrics_history", "times to first token"),
    _At(
        "lmms_eval.loggers.evaluation_tracker:EvaluationTracker.save_results_aggregated",
        "the results file",
        says=("_results.json",),
    ),
    _At(
        "lmms_eval.loggers.evaluation_tracker:EvaluationTracker.save_results_samples",
        "the sample logs",
        says=("_samples_", ".jsonl"),
    ),
)
_GENERIC = ("lmms_eval.models.chat.huggingface", "lmms_eval.models.chat.async_hf_model")
GENERIC = (
    *(_At(module, "the class that is loaded", has=("AutoModel", "AutoModelForImageTextToText")) for module in _GENERIC),
    _At(f"{_GENERIC[1]}:AsyncHFModel.__init__", "its worker", says=("_workers",)),
)
EVERY = (*COMMAND_LINE, *TASKS, *MODELS, *EVALUATION, *GENERIC)
