//! Kernel of distances and its sparsification.

/// Sparsification of a matrix of kernel values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sparsify {
    /// Quantile of the magnitudes up to which entries are 0.
    pub sparsity: f64,
    /// Value of the entries that are kept.
    pub kept: KeptValue,
}

/// Value of a kept entry `m` above the threshold `t`. The factor of `m` is constant: the derivative is the factor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeptValue {
    /// `m |m|`.
    #[default]
    Weighted,
    /// `m (|m| - t)`.
    AboveThreshold,
    /// `m`.
    Plain,
}

impl KeptValue {
    /// Factor of a kept entry, given its magnitude.
    #[inline(always)]
    pub(super) fn factor(self, magnitude: f32, threshold: f64) -> f32 {
        match self {
            Self::Weighted => magnitude,
            Self::AboveThreshold => (f64::from(magnitude) - threshold) as f32,
            Self::Plain => 1.0,
        }
    }
}

/// Distance kernel of two lists of points: `K_ij = sum over h of c_h |p_hi - q_hj|`, and with a mixture `(a, t, b)` the matrix
/// `K + a softmax_j(K / t) + b`. The derivative of a distance is 0 where it is 0.
#[derive(Clone, Debug, PartialEq)]
pub struct DistanceKernel {
    /// Factor `c` of every head.
    pub coefficients: Vec<f32>,
    /// True if there is a mixture.
    pub mixed: bool,
    /// Sparsification; none for all entries as they are.
    pub sparsify: Option<Sparsify>,
}
