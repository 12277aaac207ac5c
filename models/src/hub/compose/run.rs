//! A composition over the layers of its sources.

use rayon::prelude::*;

use lowrank_adapters::Factors;
use lowrank_adapters::compose::{Composed, Composite, Composition, Figures, Layer};

use super::sources::Sources;
use crate::error::ModelError;

/// Settings of a run over the layers.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Keeps dense updates as they are instead of truncating them to factors.
    pub dense: bool,
    /// Bytes of sources and work that are in memory at once; one layer always is.
    pub memory: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { dense: false, memory: 256 << 20 }
    }
}

/// Result at one layer.
#[derive(Debug)]
pub struct LayerOutcome {
    /// Path of the layer.
    pub path: String,
    /// The update or the pool's part.
    pub outcome: Outcome,
    /// Figures of the layer by name.
    pub report: Figures,
}

/// Result for a layer.
#[derive(Debug)]
pub enum Outcome {
    /// An update as factors.
    Factors(Box<Factors>),
    /// As the composition made it.
    Whole(Composite),
}

impl Sources {
    /// Rejects sources that the method does not support, and sets what depends on all layers at once.
    pub fn prepare(&self, method: &mut dyn Composition) -> Result<(), ModelError> {
        method.check(&self.names())?;
        Ok(method.plan(&self.sizes())?)
    }

    /// Composes one layer with a method that was prepared, dense updates as they are; none if no source has the layer.
    pub fn compose_layer(&mut self, method: &dyn Composition, path: &str) -> Result<Option<LayerOutcome>, ModelError> {
        let Some(shape) = self.layers().get(path).copied() else { return Ok(None) };
        let layer = self.take(path, shape)?;
        outcome(method, layer, true).map(Some)
    }

    /// Composes all layers and hands each result over, in the order of their paths. Layers that fit in memory together are composed in parallel.
    pub fn compose(
        &mut self,
        method: &mut dyn Composition,
        options: Options,
        mut take: impl FnMut(LayerOutcome) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        self.prepare(method)?;
        let (sizes, method) = (self.sizes(), &*method);
        let layers: Vec<(String, [usize; 2])> =
            self.layers().iter().map(|(path, shape)| (path.clone(), *shape)).collect();
        let count = self.names().len();
        let bytes = |place: usize| {
            let [d_in, d_out] = sizes[place].shape;
            let ranks: usize = sizes[place].ranks.iter().sum();
            8 * (4 * ranks * (d_in + d_out) + method.dense_matrices(count) * d_in * d_out) as u64
        };
        let mut next = 0;
        while next < layers.len() {
            let (mut batch, mut used) = (Vec::new(), 0);
            while next < layers.len() && (batch.is_empty() || used + bytes(next) <= options.memory) {
                let (path, shape) = &layers[next];
                used += bytes(next);
                batch.push(self.take(path, *shape)?);
                next += 1;
            }
            let made: Vec<Result<LayerOutcome, ModelError>> =
                batch.into_par_iter().map(|layer| outcome(method, layer, options.dense)).collect();
            for result in made {
                take(result?)?;
            }
        }
        Ok(())
    }
}

fn outcome(method: &dyn Composition, layer: Layer, dense: bool) -> Result<LayerOutcome, ModelError> {
    let Composed { result, mut report } = method.compose(&layer)?;
    let path = layer.path;
    let outcome = match result {
        result @ Composite::Pool(_) => Outcome::Whole(result),
        result if dense => Outcome::Whole(result),
        result => {
            let truncates = matches!(result, Composite::Dense { .. });
            let Some((factors, residual)) = result.into_factors() else { unreachable!("an update has factors") };
            if truncates {
                report.insert("residual".into(), residual.into());
            }
            Outcome::Factors(Box::new(factors))
        }
    };
    Ok(LayerOutcome { path, outcome, report })
}
