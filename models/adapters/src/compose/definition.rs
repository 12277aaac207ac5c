//! Interface of a composition.

use std::fmt::Debug;
use std::ops::Deref;

use lowrank_optim::registry::{Entry, Options, Registered};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::algebra::truncated;
use super::error::ComposeError;
use super::pool::PoolLayer;
use super::source::{Layer, Matrix, transposed_tensor};
use crate::ground::structure::Factors;

/// A combination of the updates of several adapters. Layers are composed one by one, without a model.
pub trait Composition: Debug + Send + Sync {
    /// Composes the sources of one layer.
    fn compose(&self, layer: &Layer) -> Result<Composed, ComposeError>;

    /// Rejects numbers of sources that the method does not support.
    fn check(&self, _sources: &[String]) -> Result<(), ComposeError> {
        Ok(())
    }

    /// Sets what depends on all layers at once, whose shapes and ranks are given.
    fn plan(&mut self, _layers: &[LayerSize]) -> Result<(), ComposeError> {
        Ok(())
    }

    /// Number of dense `[d_out, d_in]` matrices in memory for n sources; 0 if none is formed.
    fn dense_matrices(&self, _sources: usize) -> usize {
        0
    }
}

/// Size of one layer of all sources.
#[derive(Clone, Debug)]
pub struct LayerSize {
    /// `[d_in, d_out]`.
    pub shape: [usize; 2],
    /// Rank of each source.
    pub ranks: Vec<usize>,
}

/// The result at one layer.
#[derive(Clone, Debug)]
pub struct Composed {
    /// The update, or the pool's part.
    pub result: Composite,
    /// Figures of the layer by name: cluster sizes, cross-talk, residuals.
    pub report: Figures,
}

/// Figures of a layer by name.
pub type Figures = Map<String, Value>;

/// Result of a composition for a layer.
#[derive(Clone, Debug)]
pub enum Composite {
    /// The update `B A`.
    Factors {
        /// Factor at the input `[rank, d_in]`.
        a: Matrix,
        /// Factor at the output `[d_out, rank]`.
        b: Matrix,
    },
    /// A dense update `[d_out, d_in]`, which an adapter holds truncated to this rank.
    Dense {
        /// The update.
        delta: Matrix,
        /// Rank in an adapter folder.
        rank: usize,
    },
    /// Part of a pool that gives each source back.
    Pool(Box<PoolLayer>),
}

impl Composed {
    /// Update `B A`.
    pub fn factors(a: Matrix, b: Matrix) -> Self {
        Self { result: Composite::Factors { a, b }, report: Figures::new() }
    }

    /// Dense update.
    pub fn dense(delta: Matrix, rank: usize) -> Self {
        Self { result: Composite::Dense { delta, rank }, report: Figures::new() }
    }

    /// Adds a figure to the report.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.report.insert(name.to_string(), value.into());
        self
    }
}

impl Composite {
    /// The update as factors of scale 1 and the share of its norm that truncation left out; none for a pool.
    pub fn into_factors(self) -> Option<(Factors, f64)> {
        let (a, b, residual) = match self {
            Self::Factors { a, b } => (a, b, 0.0),
            Self::Dense { delta, rank } => truncated(delta, rank),
            Self::Pool(_) => return None,
        };
        Some((Factors { a: transposed_tensor(&a), b: transposed_tensor(&b), scale: 1.0 }, residual))
    }

    /// The dense update `[d_out, d_in]`; none for a pool.
    pub fn into_delta(self) -> Option<Matrix> {
        match self {
            Self::Factors { a, b } => Some(b * a),
            Self::Dense { delta, .. } => Some(delta),
            Self::Pool(_) => None,
        }
    }
}

/// Entry of the list of compositions.
#[derive(Clone, Copy, Debug)]
pub struct CompositionEntry {
    /// Description of the composition.
    pub entry: Entry,
    /// True if it makes a pool, from which the sources are rebuilt, instead of one adapter.
    pub makes_pool: bool,
    /// Reads the composition with the given options on top of its defaults.
    pub read: fn(&Options) -> Result<Box<dyn Composition>, ComposeError>,
}

impl Deref for CompositionEntry {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        &self.entry
    }
}

impl Registered for CompositionEntry {
    fn entry(&self) -> &Entry {
        &self.entry
    }
}

/// Reads a composition whose fields are its options.
pub(super) fn read<C: Composition + DeserializeOwned + 'static>(
    entry: &CompositionEntry,
    options: &Options,
) -> Result<Box<dyn Composition>, ComposeError> {
    Ok(Box::new(entry.entry.configure::<C>(options)?))
}
