//! Outcome of attaching an adapter.

use std::collections::BTreeMap;
use std::fmt;

use crate::ground::control::Control;
use crate::ground::site::Place;
use crate::ground::spec::Spec;

/// Result of attaching an adapter.
#[derive(Clone, Debug)]
pub struct Report {
    /// Structure of the adapter.
    pub structure: &'static Spec,
    /// Handle of the adapter.
    pub control: Control,
    /// Adapted layers.
    pub layers: Vec<Adapted>,
    /// Number of parameters of the model itself that are trained in addition: modules that are trained whole, and biases.
    pub whole: usize,
    /// Warnings about settings that are allowed but rarely intended.
    pub warnings: Vec<String>,
}

/// A layer that was adapted.
#[derive(Clone, Debug)]
pub struct Adapted {
    /// Static properties of the layer.
    pub place: Place,
    /// Number of trained parameters.
    pub trained: usize,
    /// Number of frozen elements stored for this layer.
    pub frozen: usize,
    /// Bytes of tensors shared with other layers, by key.
    pub shared: BTreeMap<String, u64>,
}

impl Report {
    /// Number of trained parameters in all layers.
    pub fn trained(&self) -> usize {
        self.layers.iter().map(|layer| layer.trained).sum()
    }

    /// Bytes stored in addition to the trained parameters; shared tensors count once.
    pub fn frozen_bytes(&self) -> u64 {
        let own: usize = self.layers.iter().map(|layer| layer.frozen * 4).sum();
        let shared: BTreeMap<&String, &u64> = self.layers.iter().flat_map(|layer| &layer.shared).collect();
        own as u64 + shared.into_values().sum::<u64>()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} on {} layers: {} values trained, {} bytes stored beside them",
            self.structure.name,
            self.layers.len(),
            self.trained(),
            self.frozen_bytes()
        )?;
        match self.whole {
            0 => Ok(()),
            whole => write!(f, "; {whole} values of the model are trained as well"),
        }
    }
}
