//! Adapters of vision transformers under the names that `transformers` had before version 5: `vit.encoder.layer.0.attention.attention.query`
//! for `vit.layers.0.attention.q_proj`.

use std::collections::{BTreeMap, BTreeSet};

use super::folder::MODEL;
use super::read::PeftFolder;
use crate::hub::vit_module_name;
use lowrank_adapters::{AdapterError, NamePattern, Targets};

/// Beginning of the old path of a block.
const OLD: &str = "vit.encoder.layer.";

impl PeftFolder {
    /// The folder in the names of the module. `layers` are the paths of the adapted layers in the names of the file.
    pub(super) fn in_module_names(mut self, layers: &BTreeSet<String>) -> Result<Self, AdapterError> {
        if !layers.iter().any(|layer| layer.starts_with(OLD)) {
            return Ok(self);
        }
        let renamed = self.files.rename(|name| match name.strip_prefix(MODEL) {
            Some(inner) => format!("{MODEL}{}", vit_module_name(inner)),
            None => name.to_string(),
        });
        renamed.map_err(|error| AdapterError::Refused(error.to_string()))?;
        let config = &mut self.config;
        config.rank_pattern = by_layer("rank_pattern", &config.rank_pattern, layers)?;
        config.alpha_pattern = by_layer("alpha_pattern", &config.alpha_pattern, layers)?;
        config.targets = Targets::Names(layers.iter().map(|layer| vit_module_name(layer)).collect());
        (config.exclude, config.layers) = (None, None);
        Ok(self)
    }
}

/// Patterns of the old names as one pattern for each layer that one of them matches; the first counts.
fn by_layer<T: Clone>(
    key: &str,
    patterns: &[(String, T)],
    layers: &BTreeSet<String>,
) -> Result<Vec<(String, T)>, AdapterError> {
    let mut found = BTreeMap::new();
    for (text, value) in patterns {
        let pattern = NamePattern::new(text, key)?;
        for layer in layers {
            if pattern.matches(layer)? {
                found.entry(layer).or_insert_with(|| (regex::escape(&vit_module_name(layer)), value.clone()));
            }
        }
    }
    Ok(found.into_values().collect())
}
