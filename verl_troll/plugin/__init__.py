"""The plugin: connects the mathematics to verl.

Importing this package registers the ``troll`` policy loss and the engines, and applies the patches that keep metric
names, check the nodes of a cluster and notice when TransferQueue has lost an actor. With the Hydra group
``+troll=default`` verl imports it in every process that needs it (``actor_rollout_ref.model.external_lib``, and the
``_target_`` of the actor's config). An error here ends the run.
"""

from importlib.util import find_spec

from verl_troll.versions import check_verl_version

check_verl_version()

from verl_troll.patches import ray_init, registry, transfer_queue_lost, verl_metric_names  # noqa: E402
from verl_troll.plugin import backends, policy_loss  # noqa: E402
from verl_troll.plugin.cluster_check import check_cluster  # noqa: E402

registry.apply(verl_metric_names.PATCH)
registry.apply(ray_init.PATCH, check_cluster)
if find_spec("transfer_queue") is not None:  # verl's legacy trainer does without
    registry.apply(transfer_queue_lost.PATCH)
policy_loss.register()
backends.register()
