//! `rank.json` and `modules.json`: what an allocation has given each layer, and which layers it has selected, as of the newest checkpoint.

use lowrank_models::adapter::{AllocationView, LayerAllocation, SELECTED};
use serde::Serialize;

use super::metrics::Layers;

/// Content of the file.
#[derive(Clone, Debug, Serialize)]
pub struct RankFile {
    /// Step of the checkpoint.
    pub step: u64,
    /// Sum of the ranks of all layers.
    pub total_rank: usize,
    /// Allocation of the layers by path.
    pub layers: Layers,
}

impl RankFile {
    /// The allocation at a step.
    pub fn of(step: u64, view: &AllocationView) -> Self {
        let layers = view.layers();
        Self { step, total_rank: layers.values().map(|layer| layer.rank).sum(), layers }
    }

    /// Text of the file.
    pub fn text(&self) -> String {
        text(self)
    }
}

/// Content of the file of selected layers.
#[derive(Clone, Debug, Serialize)]
pub struct ModuleFile {
    /// Step of the checkpoint.
    pub step: u64,
    /// Paths of the layers that keep an adapter of their own.
    pub modules: Vec<String>,
}

impl ModuleFile {
    /// The selection at a step; none if layers are not selected, or not yet.
    pub fn of(step: u64, view: &AllocationView) -> Option<Self> {
        let layers = view.layers();
        let selected = |layer: &LayerAllocation| layer.figures.get(SELECTED).copied();
        layers.values().any(|layer| selected(layer).is_some()).then(|| Self {
            step,
            modules: layers
                .into_iter()
                .filter(|(_, layer)| selected(layer) == Some(1.0))
                .map(|(path, _)| path)
                .collect(),
        })
    }

    /// Text of the file.
    pub fn text(&self) -> String {
        text(self)
    }
}

fn text(content: &impl Serialize) -> String {
    match serde_json::to_string_pretty(content) {
        Ok(text) => text + "\n",
        Err(error) => unreachable!("texts and numbers by names are JSON: {error}"),
    }
}
