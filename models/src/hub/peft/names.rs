//! Names of tensors as different trainers write them.

use std::collections::{BTreeMap, BTreeSet};

use super::folder::{MODEL, SHARED};

/// Parts of names that wrappers of a training program add.
const WRAPPERS: [&str; 4] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"];

/// The name that `peft` gives a tensor: without the wrappers of compilers and distributed training, once behind the prefix.
pub(super) fn canonical(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    let mut inner = parts.join(".");
    let mut prefixed = false;
    loop {
        let rest = inner.strip_prefix("module.").or_else(|| inner.strip_prefix(MODEL));
        let Some(rest) = rest.map(str::to_string) else { break };
        prefixed |= inner.starts_with(MODEL);
        inner = rest;
    }
    match !prefixed && inner.starts_with(SHARED) {
        true => inner,
        false => format!("{MODEL}{inner}"),
    }
}

/// Layers of the file that have another path in the model: one without the name of the body around it, or with a name around the model.
pub(super) fn aliases(file: &BTreeSet<String>, model: &BTreeSet<String>) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for path in file.difference(model) {
        let within = |own: &&String| own.ends_with(&format!(".{path}")) || path.ends_with(&format!(".{own}"));
        let mut candidates = model.iter().filter(within);
        if let (Some(own), None) = (candidates.next(), candidates.next())
            && !file.contains(own)
        {
            found.insert(path.clone(), own.clone());
        }
    }
    found
}

/// The name of a tensor with the path that its layer has in the model.
pub(super) fn renamed(name: &str, aliases: &BTreeMap<String, String>) -> String {
    let Some(inner) = name.strip_prefix(MODEL) else { return name.to_string() };
    let dots = inner.match_indices('.').map(|(dot, _)| (&inner[..dot], &inner[dot..]));
    let own = dots.into_iter().find_map(|(path, rest)| Some((aliases.get(path)?, rest)));
    own.map_or(name.to_string(), |(path, rest)| format!("{MODEL}{path}{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrappers_and_repeated_prefixes_are_left_out() {
        let own = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight";
        for name in [
            own,
            "model.layers.0.mlp.up_proj.lora_A.weight",
            "module.base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
            "_orig_mod.base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.lora_A.weight",
            "_fsdp_wrapped_module.base_model.model.base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        ] {
            assert_eq!(canonical(name), own, "{name}");
        }
        assert_eq!(canonical("base_model.vera_A"), "base_model.vera_A");
    }

    #[test]
    fn layers_are_found_by_the_end_of_their_path_if_there_is_one_such() {
        let set = |paths: &[&str]| paths.iter().map(|path| path.to_string()).collect::<BTreeSet<_>>();
        let model = set(&["model.layers.0.q", "model.layers.10.q", "lm_head"]);
        let file = set(&["layers.0.q", "language.model.layers.10.q", "q", "lm_head"]);
        let found = aliases(&file, &model);
        let expected = [("layers.0.q", "model.layers.0.q"), ("language.model.layers.10.q", "model.layers.10.q")];
        assert_eq!(found, expected.map(|(one, two)| (one.to_string(), two.to_string())).into());
        assert_eq!(
            renamed("base_model.model.layers.0.q.lora_A.weight", &found),
            "base_model.model.model.layers.0.q.lora_A.weight"
        );
    }
}
