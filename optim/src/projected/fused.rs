//! The whole step of DCT-AdamW in three passes over memory, on the CPU backend.
//!
//! Lines are the transformed vectors: rows on the right, columns on the left. Every line of the gradient is transformed once; the low-rank
//! gradient and Adam's direction go back through one transform, as real and imaginary part.

use std::cell::RefCell;

use burn::tensor::Tensor;
use lowrank_kernels::dct::{Dct, DctBasis};
use lowrank_kernels::elementwise::{Adam, adam};
use lowrank_kernels::host::{Memory, indices, is_cpu, transpose_into};
use lowrank_kernels::vectorised::vectorised;
use rayon::prelude::*;

use crate::projected::config::{Inner, Norm, OnRenewal, ProjectFrom, ProjectedConfig, ProjectorKind, Residual, Side};
use crate::projected::idle::column_sizes;
use crate::projected::projector::top_k_indices;
use crate::projected::state::ProjectedState;
use crate::projected::subspace::{Subspace, index_tensor};
use crate::state::error_feedback::{ErrorBuffer, ErrorFeedback};
use crate::state::moments::{MomentType, Storage};

/// Reports whether the fused step supports this configuration and state.
pub fn fits(c: &ProjectedConfig, w: &Tensor<2>, s: &ProjectedState) -> bool {
    c.projector == ProjectorKind::Dct
        && c.fft
        && c.basis != DctBasis::Random
        && !c.weighted
        && c.rank_of(w.dims()) > 0
        && c.side != Side::Full
        && c.project_from == ProjectFrom::Gradient
        && matches!(c.on_renewal, OnRenewal::Keep | OnRenewal::Rotate)
        && matches!(c.inner, Inner::Adam | Inner::AdamLegacy)
        && matches!(c.residual, Residual::None | Residual::Full | Residual::Quantised)
        && c.moments == MomentType::F32
        && c.lazy_queue == 0
        && matches!(s.subspace, None | Some(Subspace::Dct(..)))
        && is_cpu(&w.device())
}

/// Lines that one task processes; even, because two share a transform.
const LINES: usize = 32;

/// Rows of a transposition that one task processes: one cache line of elements.
const TILE: usize = 16;

thread_local! {
    /// Two matrices' worth of lines, reused from step to step.
    static LINES_MEMORY: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// One step.
pub fn step(
    c: &ProjectedConfig,
    lr: f64,
    w: Tensor<2>,
    g: Tensor<2>,
    s: ProjectedState,
) -> (Tensor<2>, ProjectedState) {
    LINES_MEMORY.with(|memory| {
        let mut memory = memory.borrow_mut();
        let [x, y] = &mut *memory;
        let size = w.shape().num_elements();
        x.resize(size, 0.0);
        y.resize(size, 0.0);
        FusedStep { c, shape: w.dims(), right: c.right(w.dims()) }.run(lr, w, g, s, x, y)
    })
}

struct FusedStep<'a> {
    c: &'a ProjectedConfig,
    shape: [usize; 2],
    right: bool,
}

impl FusedStep<'_> {
    fn run(
        &self,
        lr: f64,
        w: Tensor<2>,
        g: Tensor<2>,
        mut s: ProjectedState,
        x: &mut [f32],
        y: &mut [f32],
    ) -> (Tensor<2>, ProjectedState) {
        let (c, device, [rows, columns]) = (self.c, w.device(), self.shape);
        let (n, lines) = if self.right { (columns, rows) } else { (rows, columns) };
        let rank = c.rank_of(self.shape);
        let dct = Dct::of(n);

        let sizes = match &s.moment_1 {
            Some(m) if !self.right && matches!(c.residual, Residual::Quantised) => {
                Some(lowrank_kernels::host::values(column_sizes(&g, &m.clone().restored())))
            }
            _ => None,
        };
        let mut g = Memory::of(g);
        if let Some(error) = s.error.take() {
            error.add_to(g.write());
            if let Some(sizes) = sizes.filter(|sizes| sizes.contains(&0.0)) {
                g.write().par_chunks_mut(columns).with_min_len(LINES).for_each(|row| {
                    row.iter_mut().zip(&sizes).filter(|(_, size)| **size == 0.0).for_each(|(x, _)| *x = 0.0);
                });
            }
        }
        let a = g.read();
        match self.right {
            true => x.par_chunks_mut(1 << 14).zip(a.par_chunks(1 << 14)).for_each(|(x, a)| x.copy_from_slice(a)),
            false => transpose_into(a, [rows, columns], x),
        }
        let renews = s.subspace.is_none() || c.renews(s.time, s.gap);
        let scores = self.transform(&dct, x, renews);
        let old = match &s.subspace {
            Some(Subspace::Dct(_, old)) => Some(indices(old)),
            _ => None,
        };
        let chosen = match (&old, renews) {
            (Some(old), false) => old.clone(),
            _ => top_k_indices(&scores, rank),
        };
        s.renewals += u64::from(renews);

        // The low-rank gradient line by line, then as the moments are stored.
        let mut low = vec![0.0; lines * rank];
        low.par_chunks_mut(rank).zip(x.par_chunks(n)).with_min_len(LINES).for_each(|(low, line)| {
            low.iter_mut().zip(&chosen).for_each(|(low, place)| *low = line[*place as usize]);
        });
        let stored = |lines_first: Vec<f32>| self.transposed(lines_first, [lines, rank]);
        let low_shape = if self.right { [lines, rank] } else { [rank, lines] };
        let tensor = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<2>::from_data(burn::tensor::TensorData::new(values, shape), &device)
        };
        let zeros = || tensor(vec![0.0; lines * rank], low_shape);
        let moments = s.moment_1.take().zip(s.moment_2.take()).map(|(m, v)| (m.restored(), v.restored()));
        let (m, v) = match (moments, &old) {
            (None, _) => (zeros(), zeros()),
            (Some((m, v)), Some(old)) if renews && c.on_renewal == OnRenewal::Rotate && *old != chosen => {
                (self.carried(m, old, &chosen), self.carried(v, old, &chosen))
            }
            (Some(moments), _) => moments,
        };
        s.time += 1;
        s.moment_time += 1;
        let c1 = 1.0 - c.adam.beta_1.powf(s.moment_time as f64);
        let c2 = 1.0 - c.adam.beta_2.powf(s.moment_time as f64);
        let epsilon = if c.inner == Inner::Adam { c.adam.epsilon * c2.sqrt() } else { c.adam.epsilon };
        let adam_of = Adam::new(c.adam.beta_1, c.adam.beta_2, epsilon);
        let [direction, m, v] = adam(tensor(stored(low.clone()), low_shape), m, v, adam_of);
        let direction = self.transposed(lowrank_kernels::host::values(direction), low_shape);

        self.back(&dct, x, y, &low, &direction, &chosen);
        let rate = lr * c.proj_lr_scale * c.scale * c2.sqrt() / c1;
        let w = self.finish(lr, rate, w, g, [x, y], &mut s);

        let storage = Storage::from(MomentType::F32);
        s.moment_1 = Some(storage.keep(m, true));
        s.moment_2 = Some(storage.keep(v, false));
        s.subspace = Some(Subspace::Dct(c.basis, index_tensor(chosen, &device)));
        (w, s)
    }

    /// Transforms all lines; returns the score of each basis vector if requested.
    fn transform(&self, dct: &Dct, x: &mut [f32], scored: bool) -> Vec<f32> {
        let n = if self.right { self.shape[1] } else { self.shape[0] };
        let parts: Vec<Vec<f32>> = x
            .par_chunks_mut(LINES * n)
            .map_init(
                || (dct.scratch(), vec![0.0; n]),
                |(scratch, spare), lines| {
                    for pair in lines.chunks_mut(2 * n) {
                        let (a, b) = pair.split_at_mut(n);
                        let b = if b.is_empty() { &mut spare[..] } else { b };
                        dct.transform_pair(a, b, self.c.basis, false, scratch);
                    }
                    let mut scores = vec![0.0; if scored { n } else { 0 }];
                    for line in lines.chunks(n).filter(|_| scored) {
                        vectorised(
                            #[inline(always)]
                            || match self.c.norm {
                                Norm::L1 => scores.iter_mut().zip(line).for_each(|(score, x)| *score += x.abs()),
                                Norm::L2 => scores.iter_mut().zip(line).for_each(|(score, x)| *score += x * x),
                            },
                        );
                    }
                    scores
                },
            )
            .collect();
        // Summed in the order of the lines, for any number of threads.
        let mut scores = vec![0.0; if scored { n } else { 0 }];
        for part in parts {
            scores.iter_mut().zip(part).for_each(|(score, part): (&mut f32, f32)| *score += part);
        }
        scores
    }

    /// Moments at the positions of the remaining vectors; others start at 0.
    fn carried(&self, moment: Tensor<2>, old: &[i32], new: &[i32]) -> Tensor<2> {
        let from: Vec<Option<usize>> = new.iter().map(|index| old.binary_search(index).ok()).collect();
        let mut memory = Memory::of(moment);
        let length = if self.right { self.shape[0] } else { self.shape[1] };
        let rank = new.len();
        match self.right {
            true => memory.write().par_chunks_mut(rank).with_min_len(LINES).for_each_init(
                || vec![0.0; rank],
                |before, line| {
                    before.copy_from_slice(line);
                    line.iter_mut().zip(&from).for_each(|(x, from)| *x = from.map_or(0.0, |from| before[from]));
                },
            ),
            false => {
                let before = memory.read().to_vec();
                memory.write().par_chunks_mut(length).zip(&from).for_each(|(row, from)| match from {
                    Some(from) => row.copy_from_slice(&before[from * length..][..length]),
                    None => row.fill(0.0),
                });
            }
        }
        memory.tensor()
    }

    /// Fills `x` with the low-rank gradient and `y` with the direction in full size, line by line.
    fn back(&self, dct: &Dct, x: &mut [f32], y: &mut [f32], low: &[f32], direction: &[f32], chosen: &[i32]) {
        let (n, rank) = (if self.right { self.shape[1] } else { self.shape[0] }, chosen.len());
        let fill = |line: &mut [f32], values: &[f32]| {
            line.fill(0.0);
            chosen.iter().zip(values).for_each(|(place, value)| line[*place as usize] = *value);
        };
        let low_rank = low.par_chunks(LINES * rank).zip(direction.par_chunks(LINES * rank));
        let full = x.par_chunks_mut(LINES * n).zip(y.par_chunks_mut(LINES * n));
        full.zip(low_rank).for_each_init(
            || (dct.scratch(), vec![0.0; n]),
            |(scratch, spare), ((x, y), (low, direction))| {
                if self.c.residual == Residual::None {
                    // The residual is not needed: two directions share a transform.
                    for (pair, values) in y.chunks_mut(2 * n).zip(direction.chunks(2 * rank)) {
                        let (a, b) = pair.split_at_mut(n);
                        let (for_a, for_b) = values.split_at(rank);
                        fill(a, for_a);
                        let b = if b.is_empty() { &mut spare[..] } else { b };
                        fill(b, for_b);
                        dct.transform_pair(a, b, self.c.basis, true, scratch);
                    }
                    return;
                }
                let values = low.chunks(rank).zip(direction.chunks(rank));
                for ((x, y), (low, direction)) in x.chunks_mut(n).zip(y.chunks_mut(n)).zip(values) {
                    fill(x, low);
                    fill(y, direction);
                    dct.transform_pair(x, y, self.c.basis, true, scratch);
                }
            },
        );
    }

    /// Moves the weights and stores the residual.
    fn finish(
        &self,
        lr: f64,
        rate: f64,
        w: Tensor<2>,
        g: Memory<2>,
        [x, y]: [&[f32]; 2],
        s: &mut ProjectedState,
    ) -> Tensor<2> {
        let (c, columns) = (self.c, self.shape[1]);
        let decay = 1.0 - lr * c.adam.weight_decay;
        let (keep, rate) = (decay as f32, if c.decay_after { rate * decay } else { rate } as f32);
        let mut w = Memory::of(w);
        w.write().par_chunks_mut(TILE * columns).enumerate().for_each_init(
            || vec![0.0; TILE * columns],
            |tile, (number, w)| {
                let y = self.rows(y, number * TILE, w.len() / columns, tile);
                vectorised(
                    #[inline(always)]
                    || {
                        w.iter_mut().zip(y).for_each(|(w, y)| *w = *w * keep - rate * y);
                    },
                );
            },
        );
        let how = c.residual.feedback();
        let mut g = g;
        if how != ErrorFeedback::None {
            g.write().par_chunks_mut(TILE * columns).enumerate().for_each_init(
                || vec![0.0; TILE * columns],
                |tile, (number, g)| {
                    let x = self.rows(x, number * TILE, g.len() / columns, tile);
                    vectorised(
                        #[inline(always)]
                        || g.iter_mut().zip(x).for_each(|(g, x)| *g -= x),
                    );
                },
            );
        }
        s.error = ErrorBuffer::keep(g.tensor(), how, c.error_levels);
        w.tensor()
    }

    /// Rows of the matrix from its lines.
    fn rows<'b>(&self, lines: &'b [f32], first: usize, count: usize, tile: &'b mut [f32]) -> &'b [f32] {
        let [rows, columns] = self.shape;
        if self.right {
            return &lines[first * columns..][..count * columns];
        }
        for (column, line) in lines.chunks(rows).enumerate() {
            for (row, x) in line[first..first + count].iter().enumerate() {
                tile[row * columns + column] = *x;
            }
        }
        &tile[..count * columns]
    }

    /// Between lines first and as moments are stored, which differ on the left.
    fn transposed(&self, values: Vec<f32>, shape: [usize; 2]) -> Vec<f32> {
        if self.right {
            return values;
        }
        let mut transposed = vec![0.0; values.len()];
        transpose_into(&values, shape, &mut transposed);
        transposed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::MatrixRule;
    use crate::matrix_id::MatrixId;
    use crate::methods::dct_adamw::DctAdamWConfig;
    use burn::tensor::Device;
    use lowrank_kernels::host::values;
    use lowrank_kernels::random::normal_matrix;

    #[test]
    fn equals_the_step_of_tensor_operations() {
        let device = Device::default();
        for shape in [[20usize, 12], [12, 20], [33, 33], [7, 1], [1, 7], [64, 96]] {
            for feedback in [ErrorFeedback::None, ErrorFeedback::Full, ErrorFeedback::Quantised] {
                for (gap, basis, rotate) in
                    [(1, DctBasis::Dct3, true), (3, DctBasis::Dct2, true), (2, DctBasis::Dct3, false)]
                {
                    let rank = shape[0].min(shape[1]).div_ceil(2);
                    let config = DctAdamWConfig::new(rank)
                        .with_update_proj_gap(gap)
                        .with_basis(basis)
                        .with_rotate(rotate)
                        .with_error_feedback(feedback)
                        .with_weight_decay(0.1);
                    let rule = config.build().rule().clone();
                    let mut w = normal_matrix(0, 0, shape, &device);
                    let mut state = rule.fresh(shape, MatrixId { key: 0, number: 0, count: 1 }, &device);
                    for time in 1..=6 {
                        let g = normal_matrix(0, time, shape, &device);
                        assert!(fits(rule.config(), &w, &state));
                        let (a, state_a) = step(rule.config(), 0.01, w.clone(), g.clone(), state.clone());
                        let (b, state_b) = rule.composed(0.01, w, g, state);
                        let same = |a: &Option<Subspace>| a.as_ref().and_then(Subspace::indices);
                        assert_eq!(same(&state_a.subspace), same(&state_b.subspace));
                        for (a, b) in values(a.clone()).iter().zip(values(b.clone())) {
                            assert!((a - b).abs() < 2e-5, "{shape:?} {feedback:?} at {time}: {a} {b}");
                        }
                        let rest = |s: &ProjectedState| s.error.as_ref().and_then(ErrorBuffer::restored).map(values);
                        for (a, b) in rest(&state_a).iter().flatten().zip(rest(&state_b).iter().flatten()) {
                            // One code of the quantisation, which depends on rounding.
                            assert!((a - b).abs() < 0.05, "{shape:?} at {time}: {a} {b}");
                        }
                        (w, state) = (a, state_a);
                    }
                }
            }
        }
    }
}
