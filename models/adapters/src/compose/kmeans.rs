//! k-means with a fixed order of everything: seeded starts, ties, empty clusters.

use lowrank_kernels::random::generator;
use rand::RngExt;

use super::source::Matrix;

/// A clustering of the columns of a matrix.
#[derive(Clone, Debug)]
pub struct Clusters {
    /// Cluster of each column.
    pub assignment: Vec<usize>,
    /// Means of the clusters, one column each.
    pub centroids: Matrix,
    /// Sum of squared distances to the own mean.
    pub inertia: f64,
    /// Assignments that were computed, the last one repeated.
    pub iterations: usize,
    /// Columns that were moved to an empty cluster.
    pub relocations: usize,
    /// Inertia after each iteration.
    pub course: Vec<f64>,
}

/// Lloyd's iterations from these columns as first means, until the assignment repeats.
///
/// A column goes to the nearest mean, of equal ones to the first. An empty cluster, in increasing order, takes the column farthest from its own mean
/// among those whose cluster has others.
pub fn from_columns(columns: &Matrix, start: &[usize], max_iter: usize) -> Clusters {
    let k = start.len();
    let mut centroids = columns.select_columns(start);
    let mut assignment = Vec::new();
    let (mut iterations, mut relocations, mut course) = (0, 0, Vec::new());
    while iterations < max_iter {
        iterations += 1;
        let (mut nearest, mut distances) = assigned(columns, &centroids);
        relocations += fill_empty(&mut nearest, &mut distances, k);
        let repeated = nearest == assignment;
        assignment = nearest;
        centroids = means(columns, &assignment, k);
        course.push(inertia(columns, &centroids, &assignment));
        if repeated {
            break;
        }
    }
    let inertia = course.last().copied().unwrap_or(0.0);
    Clusters { assignment, centroids, inertia, iterations, relocations, course }
}

/// The clustering of lowest inertia over seeded starts, of equal ones the first.
pub fn seeded(columns: &Matrix, k: usize, [seed, key]: [u64; 2], n_init: usize, max_iter: usize) -> Clusters {
    let mut best: Option<Clusters> = None;
    for restart in 0..n_init.max(1) {
        let start = spread(columns, k, [seed, key, restart as u64]);
        let found = from_columns(columns, &start, max_iter);
        if best.as_ref().is_none_or(|best| found.inertia < best.inertia) {
            best = Some(found);
        }
    }
    match best {
        Some(best) => best,
        None => unreachable!("there is at least one start"),
    }
}

/// k-means++: each next column with a probability proportional to its squared distance from those chosen.
fn spread(columns: &Matrix, k: usize, [seed, key, restart]: [u64; 3]) -> Vec<usize> {
    let count = columns.ncols();
    let mut random = generator(seed, key, restart);
    let mut chosen = vec![random.random_range(0..count)];
    let mut nearest = vec![f64::INFINITY; count];
    while chosen.len() < k {
        let last = columns.column(chosen[chosen.len() - 1]);
        for (nearest, column) in nearest.iter_mut().zip(columns.column_iter()) {
            *nearest = nearest.min(distance(column.as_slice(), last.as_slice()));
        }
        let total: f64 = nearest.iter().sum();
        let mut left = random.random::<f64>() * total;
        let drawn = nearest.iter().position(|distance| {
            left -= distance;
            left < 0.0
        });
        // Columns equal to chosen ones have no distance; then the first that is left.
        let free = |place: &usize| !chosen.contains(place);
        let next = drawn.filter(free).or_else(|| (0..count).find(free)).unwrap_or(0);
        chosen.push(next);
    }
    chosen
}

/// Squared distance, in lanes that the compiler keeps in vector registers: their order is fixed, so the sum is the same everywhere.
fn distance(x: &[f64], y: &[f64]) -> f64 {
    const LANES: usize = 8;
    let (x, y) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest = x.remainder().iter().zip(y.remainder()).map(|(x, y)| (x - y) * (x - y)).sum::<f64>();
    let mut sums = [0.0; LANES];
    for (x, y) in x.zip(y) {
        for lane in 0..LANES {
            sums[lane] += (x[lane] - y[lane]) * (x[lane] - y[lane]);
        }
    }
    sums.iter().sum::<f64>() + rest
}

fn assigned(columns: &Matrix, centroids: &Matrix) -> (Vec<usize>, Vec<f64>) {
    let nearest = columns.column_iter().map(|column| {
        let mut best = (0, f64::INFINITY);
        for (cluster, centroid) in centroids.column_iter().enumerate() {
            let distance = distance(column.as_slice(), centroid.as_slice());
            if distance < best.1 {
                best = (cluster, distance);
            }
        }
        best
    });
    nearest.unzip()
}

/// Gives each empty cluster a column; returns how many were moved.
fn fill_empty(assignment: &mut [usize], distances: &mut [f64], k: usize) -> usize {
    let mut sizes = vec![0usize; k];
    assignment.iter().for_each(|cluster| sizes[*cluster] += 1);
    let mut moved = 0;
    for cluster in 0..k {
        if sizes[cluster] > 0 {
            continue;
        }
        let mut farthest: Option<usize> = None;
        for place in (0..assignment.len()).filter(|place| sizes[assignment[*place]] > 1) {
            if farthest.is_none_or(|best| distances[place] > distances[best]) {
                farthest = Some(place);
            }
        }
        let Some(place) = farthest else { continue };
        sizes[assignment[place]] -= 1;
        sizes[cluster] = 1;
        (assignment[place], distances[place]) = (cluster, 0.0);
        moved += 1;
    }
    moved
}

fn means(columns: &Matrix, assignment: &[usize], k: usize) -> Matrix {
    let mut means = Matrix::zeros(columns.nrows(), k);
    let mut sizes = vec![0usize; k];
    for (column, cluster) in columns.column_iter().zip(assignment) {
        let mut mean = means.column_mut(*cluster);
        mean += column;
        sizes[*cluster] += 1;
    }
    for (mut mean, size) in means.column_iter_mut().zip(sizes) {
        mean /= size.max(1) as f64;
    }
    means
}

fn inertia(columns: &Matrix, centroids: &Matrix, assignment: &[usize]) -> f64 {
    let own = columns.column_iter().zip(assignment);
    own.map(|(column, cluster)| distance(column.as_slice(), centroids.column(*cluster).as_slice())).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(rows: usize, count: usize, seed: usize) -> Matrix {
        Matrix::from_fn(rows, count, |r, c| (((r * 31 + c * 17 + seed * 7) * 37 % 101) as f64 * 0.37).sin())
    }

    #[test]
    fn inertia_does_not_rise_and_every_cluster_is_used() {
        for seed in 0..20 {
            let columns = points(5, 30, seed);
            let found = seeded(&columns, 6, [seed as u64, 1], 3, 300);
            if found.relocations == 0 {
                assert!(found.course.windows(2).all(|pair| pair[1] <= pair[0] + 1e-12), "{:?}", found.course);
            }
            let used: std::collections::BTreeSet<usize> = found.assignment.iter().copied().collect();
            assert_eq!(used.len(), 6);
            let again = seeded(&columns, 6, [seed as u64, 1], 3, 300);
            assert_eq!((found.assignment, found.centroids), (again.assignment, again.centroids));
        }
    }

    #[test]
    fn equal_columns_fill_as_many_clusters_as_are_asked_for() {
        let columns = Matrix::from_element(3, 5, 0.5);
        let found = seeded(&columns, 4, [0, 0], 2, 300);
        let used: std::collections::BTreeSet<usize> = found.assignment.iter().copied().collect();
        assert_eq!((used.len(), found.inertia), (4, 0.0));
    }
}
