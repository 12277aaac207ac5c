//! Ranks, bits and sparsity of each layer, for reports.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use crate::ground::stack::Adapter;

/// Allocation of one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LayerAllocation {
    /// Number of components that have a part in the update; 0 for a layer without adapter.
    pub rank: usize,
    /// Further figures by name, such as bits.
    #[serde(flatten, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<&'static str, f64>,
}

impl LayerAllocation {
    /// Components of a layer that have a part in the update.
    pub fn of(adapter: &Adapter) -> Self {
        let all = adapter.place().rank;
        let rank = adapter.structure().active_components().map_or(all, |active| active.len());
        Self { rank, figures: BTreeMap::new() }
    }
}

/// Allocation of all layers by path, as of the last step; clones share it.
#[derive(Clone, Debug, Default)]
pub struct AllocationView(Arc<Mutex<BTreeMap<String, LayerAllocation>>>);

impl AllocationView {
    /// The layers.
    pub fn layers(&self) -> BTreeMap<String, LayerAllocation> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, layers: BTreeMap<String, LayerAllocation>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = layers;
    }
}
