"""The plugin: connects the mathematics to verl.

Importing this package registers the ``troll`` policy loss and the engines, and applies the patches that keep metric
names and check the nodes of a cluster. With the Hydra group ``+troll=default`` verl imports it in every process that
needs it (``actor_rollout_ref.model.external_lib``, and the ``_target_`` of the actor's config). An error here ends the
run.
"""

from verl_troll.versions import check_verl_version

check_verl_version()

from verl_troll.patches import ray_init, registry, verl_metric_names  # noqa: E402
from verl_troll.plugin import backends, policy_loss  # noqa: E402
from verl_troll.plugin.cluster_check import check_cluster  # noqa: E402

registry.apply(verl_metric_names.PATCH)
registry.apply(ray_init.PATCH, check_cluster)
policy_loss.register()
backends.register()
