//! The updates of one layer that are composed.

use burn::tensor::{Tensor, TensorData};
use lowrank_kernels::host::values as host;

use super::error::ComposeError;
use crate::ground::structure::Factors;

/// A matrix on the host.
pub type Matrix = nalgebra::DMatrix<f64>;

/// The update `scale B A` that one adapter makes at a layer, in the orientation of files and papers.
#[derive(Clone, Debug)]
pub struct Source {
    /// Name of the adapter.
    pub adapter: String,
    /// Factor at the input `[rank, d_in]`.
    pub a: Matrix,
    /// Factor at the output `[d_out, rank]`.
    pub b: Matrix,
    /// Scale of their product.
    pub scale: f64,
    /// Weight in the composition; the method's own if none was given.
    pub weight: Option<f64>,
    /// Shared basis that the rows of A were drawn from, if the adapter names one.
    pub basis: Option<String>,
}

impl Source {
    /// Source of an adapter's factors at a layer.
    pub fn of(adapter: &str, factors: Factors, weight: Option<f64>) -> Self {
        let Factors { a, b, scale } = factors;
        let ([d_in, rank], [_, d_out]) = (a.dims(), b.dims());
        // Row-major `[d_in, rank]` is column-major `[rank, d_in]`.
        let matrix = |tensor: Tensor<2>, rows: usize, columns: usize| {
            let values = if rows * columns == 0 { Vec::new() } else { host(tensor.without_autodiff()) };
            Matrix::from_iterator(rows, columns, values.into_iter().map(f64::from))
        };
        Self {
            adapter: adapter.to_string(),
            a: matrix(a, rank, d_in),
            b: matrix(b, d_out, rank),
            scale,
            weight,
            basis: None,
        }
    }

    /// Source without an update at a layer `[d_in, d_out]`.
    pub fn empty(adapter: &str, [d_in, d_out]: [usize; 2], weight: Option<f64>) -> Self {
        Self {
            adapter: adapter.to_string(),
            a: Matrix::zeros(0, d_in),
            b: Matrix::zeros(d_out, 0),
            scale: 1.0,
            weight,
            basis: None,
        }
    }

    /// The update as factors and a scale, without the weight.
    pub fn factors(&self) -> Factors {
        Factors { a: transposed_tensor(&self.a), b: transposed_tensor(&self.b), scale: self.scale }
    }

    /// Rank of the factors.
    pub fn rank(&self) -> usize {
        self.a.nrows()
    }

    /// Weight, or 1.
    pub fn weight(&self) -> f64 {
        self.weight.unwrap_or(1.0)
    }

    /// Weight times scale.
    pub fn weighted_scale(&self) -> f64 {
        self.weight() * self.scale
    }

    /// Norm of the update, without the weight.
    pub fn norm(&self) -> f64 {
        let square = (self.b.transpose() * &self.b).dot(&(&self.a * self.a.transpose()));
        square.max(0.0).sqrt() * self.scale.abs()
    }

    /// Dense update `[d_out, d_in]`, without the weight.
    pub fn delta(&self) -> Matrix {
        &self.b * &self.a * self.scale
    }
}

/// The sources of one layer, in the order in which they were given.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Path of the layer.
    pub path: String,
    /// Sources, at least one, all of the same `d_in` and `d_out`.
    pub sources: Vec<Source>,
}

impl Layer {
    /// Layer of these sources. Rejects sources of different sides, elements that are not finite, and no source at all.
    pub fn new(path: &str, sources: Vec<Source>) -> Result<Self, ComposeError> {
        let layer = Self { path: path.to_string(), sources };
        let Some(first) = layer.sources.first() else {
            return Err(layer.refused("has no source; name at least one adapter"));
        };
        let sides = |source: &Source| [source.a.ncols(), source.b.nrows()];
        for source in &layer.sources {
            if sides(source) != sides(first) {
                let ([d_in, d_out], [first_in, first_out]) = (sides(source), sides(first));
                return Err(layer.refused_source(
                    source,
                    format!(
                        "has {d_in} inputs and {d_out} outputs, {} has {first_in} and {first_out}; adapters of the same model are composed",
                        first.adapter
                    ),
                ));
            }
            if source.a.nrows() != source.b.ncols() {
                return Err(layer.refused_source(
                    source,
                    format!("A has {} rows, B {} columns; both are the rank", source.a.nrows(), source.b.ncols()),
                ));
            }
            for (name, factor) in [("A", &source.a), ("B", &source.b)] {
                if let Some(place) = factor.iter().position(|value| !value.is_finite()) {
                    let (row, column) = (place % factor.nrows(), place / factor.nrows());
                    let value = factor[(row, column)];
                    return Err(layer.refused_source(
                        source,
                        format!("{name}[{row}, {column}] is {value}; the adapter is damaged, train or fetch it again"),
                    ));
                }
            }
            for (name, value) in [("the scale", Some(source.scale)), ("the weight", source.weight)] {
                if let Some(value) = value.filter(|value| !value.is_finite()) {
                    return Err(layer.refused_source(source, format!("{name} is {value}; it must be finite")));
                }
            }
        }
        Ok(layer)
    }

    /// `[d_in, d_out]`.
    pub fn shape(&self) -> [usize; 2] {
        [self.sources[0].a.ncols(), self.sources[0].b.nrows()]
    }

    /// Sum of the ranks.
    pub fn total_rank(&self) -> usize {
        self.sources.iter().map(Source::rank).sum()
    }

    /// Largest rank.
    pub fn largest_rank(&self) -> usize {
        self.sources.iter().map(Source::rank).max().unwrap_or(0)
    }

    /// The rank that all sources have; rejects different ones.
    pub fn common_rank(&self, remedy: &str) -> Result<usize, ComposeError> {
        let rank = self.sources[0].rank();
        match self.sources.iter().find(|source| source.rank() != rank) {
            None => Ok(rank),
            Some(other) => Err(self.refused_source(
                other,
                format!("has rank {}, {} has rank {rank}; {remedy}", other.rank(), self.sources[0].adapter),
            )),
        }
    }

    /// The layer with sources without an update (rank 0) filled up with zeros to the rank that the others have in common.
    pub fn padded(&self, remedy: &str) -> Result<Self, ComposeError> {
        let rank = self.sources.iter().map(Source::rank).max().unwrap_or(0);
        let mut padded = self.clone();
        for source in padded.sources.iter_mut().filter(|source| source.rank() == 0) {
            source.a = Matrix::zeros(rank, source.a.ncols());
            source.b = Matrix::zeros(source.b.nrows(), rank);
        }
        padded.common_rank(remedy)?;
        Ok(padded)
    }

    /// Error about the sources of this layer.
    pub fn refused(&self, reason: impl Into<String>) -> ComposeError {
        ComposeError::Layer { layer: self.path.clone(), reason: reason.into() }
    }

    /// Error about one of its sources.
    pub fn refused_source(&self, source: &Source, reason: impl Into<String>) -> ComposeError {
        ComposeError::Source { adapter: source.adapter.clone(), layer: self.path.clone(), reason: reason.into() }
    }
}

/// Row-major tensor of a column-major matrix, transposed: `[columns, rows]`.
pub(crate) fn transposed_tensor(matrix: &Matrix) -> Tensor<2> {
    let values: Vec<f32> = matrix.iter().map(|value| *value as f32).collect();
    Tensor::from_data(TensorData::new(values, [matrix.ncols(), matrix.nrows()]), &burn::tensor::Device::default())
}
