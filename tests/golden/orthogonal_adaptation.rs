//! Orthogonal Adaptation against reference values.

use std::collections::BTreeMap;

use burn::optim::GradientsParams;
use burn::optim::SgdConfig;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::compose::{Layer, Matrix, OrthogonalSum, Source, crosstalk};
use lowrank_models::adapter::{AdapterConfig, Attach, Basis, GivenTensors};

use super::support::bench::{Bench, adapter, gradient};
use super::support::case::{Case, Outcome, host};
use super::support::compose::{matrix, near, values};

pub fn run(case: &Case) -> Outcome {
    let d_in = case.count("d_in")?;
    let basis = match case.word("basis")? {
        "qr" => Basis::orthogonalised(case.array("gaussian")?.f32(), d_in),
        "dct" => Basis::cosines(case.array("signs")?.values),
        other => return Err(format!("basis is \"{other}\"")),
    };
    let rows = Matrix::from_fn(d_in, d_in, |row, column| f64::from(basis.row(row)[column]));
    let gram = &rows * rows.transpose() - Matrix::identity(d_in, d_in);
    if gram.amax() > 1e-5 {
        return Err(format!("the basis is orthonormal only within {}", gram.amax()));
    }
    let stored = if case.word("basis")? == "qr" { rows.transpose() } else { rows.clone() };
    near(case, "basis", &stored, 1e-5)?;
    let count = case.count("concepts")?;
    let weight = matrix(case, "W")?;
    let mut sources = Vec::new();
    for concept in 0..count {
        let (a, b) = trained(case, &basis, concept)?;
        sources.push(Source {
            adapter: format!("concept{concept}"),
            a,
            b,
            scale: 1.0,
            weight: None,
            basis: Some("one".into()),
        });
    }
    let layer = Layer::new("layer", sources).map_err(|error| error.to_string())?;
    let sum = OrthogonalSum { lambda: case.number("merge_lambda")?, ..OrthogonalSum::default() };
    let method: &dyn lowrank_models::adapter::compose::Composition = &sum;
    let delta = method.compose(&layer).map_err(|error| error.to_string())?.result.into_delta().ok_or("no update")?;
    near(case, "merged", &(weight + delta), 1e-5)?;
    let between = crosstalk(&layer);
    for (name, ours) in [("crosstalk", between.crosstalk), ("basis_overlap", between.overlap)] {
        // Zeros are those of f32.
        case.array(name)?.near(name, &values(&ours), 1e-6, 1e-5)?;
    }
    Ok("basis, rows, losses, gradients, sum, overlap and cross-talk are equal".into())
}

/// Trains one concept; returns A and B as the last step leaves them.
fn trained(case: &Case, basis: &Basis, concept: usize) -> Result<(Matrix, Matrix), String> {
    let name = |what: &str| format!("concept{concept}.{what}");
    let indices = case.array(&name("indices"))?;
    let (rank, d_in, d_out) = (case.count("r")?, case.count("d_in")?, case.count("d_out")?);
    if indices.values.len() != rank {
        return Err(format!("{} indices for rank {rank}", indices.values.len()));
    }
    let rows: Vec<Vec<f32>> = indices.values.iter().map(|index| basis.row(*index as usize)).collect();
    let a = Matrix::from_fn(rank, d_in, |row, column| f64::from(rows[row][column]));
    near(case, &name("A"), &a, 1e-5)?;
    let data = |values: Vec<f32>, shape: &[usize]| TensorData::new(values, shape.to_vec());
    let given = GivenTensors::from([
        ("a".to_string(), data(rows.concat(), &[rank, d_in])),
        ("indices".to_string(), data(indices.f32(), &[rank])),
        ("b".to_string(), data(vec![0.0; d_out * rank], &[d_out, rank])),
    ]);
    let config = AdapterConfig::new("orthogonal").with_rank(rank).with_option("basis", case.word("basis")?);
    let weight = case.array("W")?.tensor::<2>().transpose().autodiff();
    let attach = Attach::new(config).with_tensors(BTreeMap::from([("layer".to_string(), given)])).factored();
    let mut bench = attach.to(Bench::new(Dense::from_parts(weight, None))).map_err(|error| error.to_string())?.0;
    let (mut optimizer, lr) = (SgdConfig::new().init(), case.number("lr")?);
    let mut step = 0;
    while case.has(&name(&format!("step{step}.x"))) {
        let of = |what: &str| name(&format!("step{step}.{what}"));
        let input = |what: &str| Ok::<_, String>(case.array(&of(what))?.tensor::<2>().autodiff());
        let output = bench.output(input("x")?);
        if step == 0 {
            let base = input("x")?.matmul(bench.base().autodiff());
            if host((output.clone() - base).inner()).iter().any(|value| value.abs() > 1e-6) {
                return Err(format!("concept {concept} does not start as the base"));
            }
        }
        let loss: Tensor<1> = (output - input("target")?).square().mean();
        let expected = case.array(&of("loss"))?;
        expected.near(&of("loss"), &host(loss.clone().inner()), 0.0, 1e-5)?;
        let grads = loss.backward();
        let grads = GradientsParams::from_grads(grads, &bench);
        let tensors = adapter(&bench).shapes();
        let b = tensors.iter().find(|tensor| tensor.field == "b").ok_or("no B")?;
        // A copy, as the optimizer needs the gradients too.
        let mut of_b = GradientsParams::new();
        let copy = grads.get::<2>(b.id).ok_or("B has no gradient")?;
        of_b.register(b.id, copy);
        let ours = gradient(&mut of_b, b)?;
        let expected = case.array(&of("grad_B"))?;
        expected.near(&of("grad_B"), &ours, 1e-5 * expected.largest(), 0.0)?;
        bench = optimizer.step(lr, bench, grads);
        let expected = case.array(&of("B"))?;
        let found = adapter(&bench).tensors().into_iter().find(|(tensor, _)| tensor.field == "b").ok_or("no B")?.1;
        let found: Vec<f32> = found.try_into_vec().map_err(|error| format!("{error:?}"))?;
        expected.near(&of("B"), &found, 1e-5 * expected.largest(), 0.0)?;
        step += 1;
    }
    if step == 0 {
        return Err(format!("concept {concept} has no step"));
    }
    let last = matrix(case, &name(&format!("step{}.B", step - 1)))?;
    Ok((a, last))
}
