//! `rank.json`: what an allocation has given each layer, as of the newest checkpoint.

use lowrank_models::adapter::AllocationView;
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
        match serde_json::to_string_pretty(self) {
            Ok(text) => text + "\n",
            Err(error) => unreachable!("numbers by names are JSON: {error}"),
        }
    }
}
