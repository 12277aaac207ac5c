//! Layouts in which `peft` stores structures: the names of their tensors and of their settings.

use serde_json::Value;

use super::keys::Keys;
use lowrank_adapters::{AdapterConfig, AdapterOptions, GivenTensors};

/// Layout in which `peft` stores a structure.
#[derive(Debug)]
pub(super) struct Layout {
    /// Name of the structure.
    pub structure: &'static str,
    /// Types it is read from; the first one is written.
    pub types: &'static [&'static str],
    /// Fields and the names of their tensors.
    pub tensors: &'static [(&'static str, &'static str)],
    /// The same at an embedding; empty where `peft` has no such adapter.
    pub embedding: &'static [(&'static str, &'static str)],
    /// Fields that all layers share, the names of their tensors, and the axis of length 1 that `peft` puts between.
    pub shared: &'static [(&'static str, &'static str, Option<usize>)],
    /// Fields of whole numbers.
    pub whole: &'static [&'static str],
    /// Key of the rank, and its value when missing; none where there is no rank.
    pub rank: Option<(&'static str, usize)>,
    /// Key of the ranks of layers by their names; none where all have the same.
    pub ranks: Option<&'static str>,
    /// Key of alpha, and its value when missing; none where there is no alpha.
    pub alpha: Option<(&'static str, f64)>,
    /// Key of the alphas of layers by their names; none where all have the same.
    pub alphas: Option<&'static str>,
    /// Alpha may be divided by the root of the rank (`use_rslora`).
    pub stabilised: bool,
    /// Key of the dropout; none where there is no dropout.
    pub dropout: Option<&'static str>,
    /// Key of the start.
    pub init: &'static str,
    /// Key of the seed; none where the file contains all random tensors, or the seed is an option of the structure.
    pub seed: Option<&'static str>,
    /// Value of `bias` for the biases of the adapted layers; none where `peft` trains none.
    pub bias: Option<&'static str>,
    /// Targets in a LLaMA when none are named.
    pub targets: &'static [&'static str],
    /// Keys of most types that this one does not have.
    pub lacks: &'static [&'static str],
    /// Keys of settings that act in training alone, and are neither read nor written.
    pub training: &'static [&'static str],
    /// Reads the options of the structure.
    pub read: fn(&mut Keys) -> Result<AdapterOptions, String>,
    /// Keys of the options of the structure; a reason where `peft` does not have them.
    pub write: fn(&AdapterConfig) -> Result<Options, String>,
    /// Conversion of an adapter that is read as another structure; none where it is that structure.
    pub folded: Option<Folded>,
}

/// Conversion of the settings and tensors of a type that is read as another structure.
#[derive(Debug)]
pub(super) struct Folded {
    /// Changes the settings.
    pub config: fn(&mut AdapterConfig),
    /// Changes the tensors of one layer; a reason where they do not belong together.
    pub tensors: fn(&mut GivenTensors) -> Result<(), String>,
}

/// Keys of the options of a structure, and their values.
pub(super) type Options = Vec<(&'static str, Value)>;
/// A layout, and the options of a configuration in its keys.
pub(super) type Stored = (&'static Layout, Options);

impl Layout {
    /// The field of a layer's tensor by what follows the path of the layer in its name. The name of an adapter may precede the ending.
    pub fn field(&self, rest: &str) -> Option<&'static str> {
        let all = self.tensors.iter().chain(self.embedding);
        all.clone().find(|(_, name)| is_named(rest, name)).map(|(field, _)| *field)
    }

    /// Returns true if a tensor has the name that a field has at an embedding, and at no linear layer.
    pub fn is_of_embedding(&self, rest: &str) -> bool {
        let named = |all: &[(&str, &str)]| all.iter().any(|(_, name)| is_named(rest, name));
        named(self.embedding) && !named(self.tensors)
    }

    /// The shared field of a tensor by the end of its name, and its extra axis.
    pub fn shared_field(&self, rest: &str) -> Option<(&'static str, Option<usize>)> {
        self.shared.iter().find(|(_, name, _)| is_named(rest, name)).map(|(field, _, axis)| (*field, *axis))
    }

    /// The name of a field's tensor at a linear layer or an embedding.
    pub fn name(&self, field: &str, embedding: bool) -> Option<&'static str> {
        let names = if embedding { self.embedding } else { self.tensors };
        names.iter().find(|(known, _)| *known == field).map(|(_, name)| *name)
    }
}

/// Returns true if a tensor has this name, as it is or with the name of an adapter inside: `lora_A.default.weight`.
fn is_named(rest: &str, name: &str) -> bool {
    const ENDING: &str = ".weight";
    let (stem, ending) = match name.strip_suffix(ENDING) {
        Some(stem) => (stem, true),
        None => (name, false),
    };
    let Some(tail) = rest.strip_prefix(stem) else { return false };
    let (tail, ended) = match tail.strip_suffix(ENDING) {
        Some(tail) => (tail, true),
        None => (tail, false),
    };
    let adapter =
        tail.strip_prefix('.').map_or(tail.is_empty(), |adapter| !adapter.is_empty() && !adapter.contains('.'));
    adapter && (ended || !ending)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_may_hold_the_name_of_an_adapter() {
        for (rest, name, same) in [
            ("lora_A.weight", "lora_A.weight", true),
            ("lora_A.default.weight", "lora_A.weight", true),
            ("lora_A", "lora_A.weight", false),
            ("lora_A.default", "lora_A.weight", false),
            ("lora_A.x.y.weight", "lora_A.weight", false),
            ("lora_AB.weight", "lora_A.weight", false),
            ("lora_magnitude_vector", "lora_magnitude_vector", true),
            ("lora_magnitude_vector.weight", "lora_magnitude_vector", true),
            ("lora_magnitude_vector.default.weight", "lora_magnitude_vector", true),
            ("lora_magnitude_vectors", "lora_magnitude_vector", false),
        ] {
            assert_eq!(is_named(rest, name), same, "{rest} {name}");
        }
    }
}
