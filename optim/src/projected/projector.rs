//! Choosing the subspace of a gradient.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::Tensor;
use lowrank_kernels::dct::{Dct, DctBasis};
use lowrank_kernels::decompose::{DirectionsError, leading_directions, orthonormal_factor};
use lowrank_kernels::elementwise::norm;
use lowrank_kernels::host::values;
use lowrank_kernels::ops::MatrixProduct;
use lowrank_kernels::random::{generator, sample};

use crate::matrix_id::MatrixId;
use crate::projected::config::{BlockOrder, Norm};
use crate::projected::subspace::{Subspace, index_tensor};
use crate::state::quantised::QuantisedMatrix;

/// Request for a subspace.
#[derive(Clone, Copy, Debug)]
pub struct Renewal<'a> {
    /// Matrix `[R, C]` whose subspace is chosen: the gradient plus the residual of error feedback, or its mix with the momentum.
    pub gradient: &'a Tensor<2>,
    /// Projects rows (`G P`) instead of columns (`P^T G`).
    pub right: bool,
    /// Number of vectors or elements to choose.
    pub rank: usize,
    /// The subspace so far.
    pub previous: Option<&'a Subspace>,
    /// Seed of the run.
    pub seed: u64,
    /// Identity of the matrix.
    pub place: MatrixId,
    /// Renewals of this matrix before this one.
    pub count: u64,
}

impl Renewal<'_> {
    /// Length of the vectors that span the subspace.
    pub fn side(&self) -> usize {
        self.gradient.dims()[usize::from(self.right)]
    }

    /// The fallback for a gradient without directions: the previous subspace, or else the first unit vectors.
    fn kept(&self, reason: DirectionsError, first: impl FnOnce() -> Subspace) -> Subspace {
        count_failure(reason);
        self.previous.cloned().unwrap_or_else(first)
    }

    /// The first unit vectors of one side, `[n, rank]`.
    fn unit_vectors(&self, right: bool) -> Tensor<2> {
        let n = self.gradient.dims()[usize::from(right)];
        Tensor::eye(n.max(self.rank), &self.gradient.device()).slice([0..n, 0..self.rank])
    }
}

/// Renewals of this process that found no directions and kept the previous subspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenewalFailures {
    /// The gradient was zero.
    pub zero: u64,
    /// The gradient had elements that were not finite.
    pub not_finite: u64,
    /// The eigenvalue iteration did not converge.
    pub not_converged: u64,
}

static FAILURES: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

/// Number of renewals since the process started that kept the previous subspace, by reason.
pub fn renewal_failures() -> RenewalFailures {
    let [zero, not_finite, not_converged] = [0, 1, 2].map(|place: usize| FAILURES[place].load(Ordering::Relaxed));
    RenewalFailures { zero, not_finite, not_converged }
}

fn count_failure(reason: DirectionsError) {
    let place = match reason {
        DirectionsError::Zero => 0,
        DirectionsError::NotFinite => 1,
        DirectionsError::NotConverged => 2,
    };
    FAILURES[place].fetch_add(1, Ordering::Relaxed);
}

/// A way to choose the subspace of a gradient.
pub trait Projector: Debug + Send + Sync {
    /// Returns the new subspace.
    fn choose(&self, renewal: &Renewal) -> Subspace;
}

/// Leading singular directions.
#[derive(Clone, Copy, Debug)]
pub struct Svd;

impl Projector for Svd {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        match leading_directions(renewal.gradient, renewal.rank, renewal.right) {
            Ok(directions) => Subspace::Dense(directions),
            Err(reason) => renewal.kept(reason, || Subspace::Dense(renewal.unit_vectors(renewal.right))),
        }
    }
}

/// Leading singular directions of both sides.
#[derive(Clone, Copy, Debug)]
pub struct TwoSidedSvd;

impl Projector for TwoSidedSvd {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        let side = |right| leading_directions(renewal.gradient, renewal.rank, right);
        match (side(false), side(true)) {
            (Ok(left), Ok(right)) => Subspace::TwoSided(left, right),
            (Err(reason), _) | (_, Err(reason)) => {
                renewal.kept(reason, || Subspace::TwoSided(renewal.unit_vectors(false), renewal.unit_vectors(true)))
            }
        }
    }
}

/// Columns of a fixed orthonormal basis that carry most of the gradient.
#[derive(Clone, Copy, Debug)]
pub struct DctColumns {
    /// The basis.
    pub basis: DctBasis,
    /// Computes coefficients by a fast Fourier transform.
    pub fft: bool,
    /// Score of a basis vector.
    pub norm: Norm,
    /// Multiplies scores by the norm of the basis vector.
    pub weighted: bool,
}

impl Projector for DctColumns {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        let device = renewal.gradient.device();
        let coefficients = self.coefficients(renewal.gradient, renewal.right);
        let scores = match self.norm {
            Norm::L1 => coefficients.abs(),
            Norm::L2 => coefficients.square(),
        };
        let mut scores = values(scores.sum_dim(usize::from(!renewal.right)));
        if self.weighted {
            self.weigh(&mut scores);
        }
        Subspace::Dct(self.basis, index_tensor(top_k_indices(&scores, renewal.rank), &device))
    }
}

impl DctColumns {
    /// `G D` on the right, `D^T G` on the left.
    pub fn coefficients(&self, g: &Tensor<2>, right: bool) -> Tensor<2> {
        let dct = Dct::of(g.dims()[usize::from(right)]);
        if !self.fft {
            let d = dct.tensor(self.basis, &g.device());
            return if right { g.clone().times(d) } else { d.transpose().times(g.clone()) };
        }
        let rows = if right { g.clone() } else { g.clone().transpose() };
        let (shape, device) = (rows.dims(), rows.device());
        let mut values = values(rows);
        dct.transform_rows(&mut values, self.basis);
        let rows = Tensor::from_data(burn::tensor::TensorData::new(values, shape), &device);
        if right { rows } else { rows.transpose() }
    }

    /// Multiplies each score with the norm of its basis vector, which only affects the sum of magnitudes.
    fn weigh(&self, scores: &mut [f32]) {
        let n = scores.len();
        let d = values(Dct::of(n).tensor(self.basis, &burn::tensor::Device::default()));
        for (j, score) in scores.iter_mut().enumerate() {
            let column = (0..n).map(|i| f64::from(d[i * n + j]));
            *score *= match self.norm {
                Norm::L1 => column.map(f64::abs).sum::<f64>() as f32,
                Norm::L2 => column.map(|x| x * x).sum::<f64>().sqrt() as f32,
            };
        }
    }
}

/// Indices of the greatest scores, ascending; of equal scores the lower index.
pub(crate) fn top_k_indices(scores: &[f32], count: usize) -> Vec<i32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    let by_score = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
    if count < order.len() {
        order.select_nth_unstable_by(count, by_score);
        order.truncate(count);
    }
    order.sort_unstable();
    order.into_iter().map(|place| place as i32).collect()
}

/// One step of block power iteration from the previous subspace; singular directions at the first renewal.
#[derive(Clone, Copy, Debug)]
pub struct PowerIteration;

impl Projector for PowerIteration {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        let mut b = renewal.gradient.clone();
        let size = norm(&b);
        // Its square is taken below; the subspace does not depend on its size.
        if size > 1e15 || size < 1e-15 && size > 0.0 {
            b = b.div_scalar(size);
        }
        let previous = renewal.previous.and_then(|previous| previous.columns(renewal.side(), &b.device()));
        let Some(p) = previous else { return Svd.choose(renewal) };
        if size == 0.0 || !size.is_finite() {
            let reason = if size == 0.0 { DirectionsError::Zero } else { DirectionsError::NotFinite };
            return renewal.kept(reason, || Subspace::Dense(p));
        }
        let y = match renewal.right {
            true => b.clone().transpose().times(b.clone().times(p)),
            false => b.clone().times(b.clone().transpose().times(p)),
        };
        Subspace::Dense(orthonormal_factor(&y))
    }
}

/// The orthonormal factor of a random matrix.
#[derive(Clone, Copy, Debug)]
pub struct RandomOrthonormal;

impl Projector for RandomOrthonormal {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        let Renewal { seed, place, count, rank, .. } = *renewal;
        let draws = Subspace::Gaussian { seed, key: place.key, count, rank };
        match draws.columns(renewal.side(), &renewal.gradient.device()) {
            Some(columns) => Subspace::Dense(orthonormal_factor(&columns)),
            None => Subspace::Nothing,
        }
    }
}

/// A random matrix that is not orthonormal and is not stored.
#[derive(Clone, Copy, Debug)]
pub struct Gaussian;

impl Projector for Gaussian {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        let Renewal { seed, place, count, rank, .. } = *renewal;
        Subspace::Gaussian { seed, key: place.key, count, rank }
    }
}

/// Random columns or rows of the matrix.
#[derive(Clone, Copy, Debug)]
pub struct RandomCoordinates;

impl Projector for RandomCoordinates {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        let mut rng = generator(renewal.seed, renewal.place.key, renewal.count);
        let chosen = sample(&mut rng, renewal.side(), renewal.rank);
        Subspace::Coordinates(index_tensor(chosen, &renewal.gradient.device()))
    }
}

/// Random single values of the matrix.
#[derive(Clone, Copy, Debug)]
pub struct RandomEntries;

impl Projector for RandomEntries {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        let mut rng = generator(renewal.seed, renewal.place.key, renewal.count);
        let chosen = sample(&mut rng, renewal.gradient.shape().num_elements(), renewal.rank);
        Subspace::Entries(index_tensor(chosen, &renewal.gradient.device()))
    }
}

/// All of some matrices and nothing of the others, in turn.
#[derive(Clone, Copy, Debug)]
pub struct ActiveMatrices {
    /// Share of matrices that are active.
    pub density: f64,
    /// Order in which they become active.
    pub order: BlockOrder,
}

impl ActiveMatrices {
    /// Matrices that are active at a time.
    pub fn active(&self, count: usize) -> usize {
        (self.density * count as f64).round() as usize
    }
}

impl Projector for ActiveMatrices {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        let (count, number) = (renewal.place.count.max(1), renewal.place.number);
        let active = self.active(count);
        // Turns before this renewal; the cursor wraps around.
        let start = |each: usize| (renewal.count as usize).wrapping_mul(each);
        let within = |place: usize, start: usize, length: usize, each: usize| {
            (place + length - start % length.max(1)) % length.max(1) < each
        };
        let chosen = match self.order {
            BlockOrder::Ascending => within(number, start(active), count, active),
            BlockOrder::Descending => within(count - 1 - number, start(active), count, active),
            BlockOrder::Random => {
                // The same draw for every matrix: its number and not its key.
                let draw = sample(&mut generator(renewal.seed, u64::MAX, renewal.count), count, active);
                draw.binary_search(&(number as i32)).is_ok()
            }
            BlockOrder::Mirror => {
                let from_end = number.min(count - 1 - number);
                within(from_end, start(active / 2), count / 2, active / 2)
            }
        };
        if chosen { Subspace::Whole } else { Subspace::Nothing }
    }
}

/// A projector whose columns are stored as small integers.
#[derive(Debug)]
pub struct Rounded<P> {
    /// Projector that chooses them.
    pub projector: P,
    /// Bits of an integer.
    pub bits: u32,
    /// Values that share a scale.
    pub group: usize,
}

impl<P: Projector> Projector for Rounded<P> {
    fn choose(&self, renewal: &Renewal) -> Subspace {
        match self.projector.choose(renewal) {
            Subspace::Dense(columns) => Subspace::Quantised(QuantisedMatrix::of(columns, self.bits, self.group)),
            other => other,
        }
    }
}
