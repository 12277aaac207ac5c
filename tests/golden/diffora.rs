//! DiffoRA against reference values: the search, the choice of layers, and shared pairs.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};
use lowrank_models::Dense;
use lowrank_models::adapter::{
    AdapterConfig, Attach, DiffoRa, Diffora, DifforaSearch, GivenTensors, SearchOrder, SearchRelaxation, SearchScope,
    SharedPairs, each_adapter, merged, selected_layers,
};
use lowrank_optim::{AdamWConfig, HookError, Losses};

use super::support::bench::{batch, near};
use super::support::case::{Case, Outcome, host};

/// Rows of linear layers whose outputs are added; `tanh` between the rows.
#[derive(Module, Debug)]
struct Net {
    rows: Vec<Row>,
}

#[derive(Module, Debug)]
struct Row {
    modules: Vec<Dense>,
}

impl Net {
    fn forward(&self, mut x: Tensor<2>) -> Tensor<2> {
        for (number, row) in self.rows.iter().enumerate() {
            let input = if number == 0 { x } else { x.tanh() };
            let outputs = row.modules.iter().map(|module| module.forward(input.clone()));
            x = match outputs.reduce(|sum, y| sum + y) {
                Some(sum) => sum,
                None => input,
            };
        }
        x
    }

    fn loss(&self, case: &Case, x: &str, target: &str) -> Result<Tensor<1>, String> {
        Ok((self.forward(batch(case, x)?) - batch(case, target)?).square().mean().mul_scalar(0.5))
    }
}

fn path(row: usize, module: usize) -> String {
    format!("rows.{row}.modules.{module}")
}

/// A tensor in the layout of files.
fn file(case: &Case, name: &str) -> Result<TensorData, String> {
    let array = case.array(name)?;
    Ok(TensorData::new(array.f32(), array.shape.clone()))
}

/// The layers of a case with adapters: names of A and B, the weight and the logit of a layer.
fn net(
    case: &Case,
    [rows, modules]: [usize; 2],
    of: impl Fn(usize, usize) -> ([String; 2], f32, f32),
) -> Result<Net, String> {
    let layer = |row: usize, module: usize| -> Result<Dense, String> {
        let weight = case.array(&format!("l{row}.m{module}.W"))?.tensor::<2>().transpose();
        Ok(Dense::from_parts(weight.autodiff(), None))
    };
    let row = |row: usize| -> Result<Row, String> {
        Ok(Row { modules: (0..modules).map(|module| layer(row, module)).collect::<Result<_, String>>()? })
    };
    let bare = Net { rows: (0..rows).map(row).collect::<Result<_, String>>()? };
    let mut tensors = BTreeMap::new();
    for (row, module) in (0..rows).flat_map(|row| (0..modules).map(move |module| (row, module))) {
        let ([a, b], gamma, theta) = of(row, module);
        let given = GivenTensors::from([
            ("a".to_string(), file(case, &a)?),
            ("b".to_string(), file(case, &b)?),
            ("gamma".to_string(), TensorData::new(vec![gamma], [1])),
            ("theta".to_string(), TensorData::new(vec![theta], [1])),
        ]);
        tensors.insert(path(row, module), given);
    }
    let config = AdapterConfig::new("diffora").with_rank(case.count("r")?).with_alpha(case.number("alpha")?);
    let scale = case.number("alpha")? / case.number("r")?;
    if (scale - case.number("scale")?).abs() > 1e-12 {
        return Err(format!("configuration: scale is not alpha / r, {scale}"));
    }
    if case.word("loss")? != "0.5*mean((out-target)^2)" {
        return Err(format!("configuration: loss is {}", case.word("loss")?));
    }
    let attach = Attach::new(config).with_tensors(tensors).factored();
    Ok(attach.to(bare).map_err(|error| error.to_string())?.0)
}

fn adapters(net: &Net) -> BTreeMap<String, Diffora> {
    let mut found = BTreeMap::new();
    each_adapter(net, |path, stack| {
        if let Some(own) = stack.stack[0].structure.downcast_ref::<Diffora>() {
            found.insert(path.to_string(), own.clone());
        }
    });
    found
}

pub fn run(case: &Case) -> Outcome {
    if case.has("dam") {
        return sharing(case);
    }
    match case.has("theta.0") {
        true => search(case),
        false => discretise(case),
    }
}

/// Rows of a matrix.
fn rows(case: &Case, name: &str) -> Result<Vec<Vec<f64>>, String> {
    let array = case.array(name)?;
    let [_, columns] = array.shape[..] else { return Err(format!("{name} is no matrix")) };
    Ok(array.values.chunks(columns).map(<[f64]>::to_vec).collect())
}

fn flags(selected: &[Vec<bool>]) -> Vec<f32> {
    selected.iter().flatten().map(|on| f32::from(u8::from(*on))).collect()
}

fn relaxation(case: &Case) -> Result<SearchRelaxation, String> {
    match case.config["relaxation"].is_null() {
        true => Ok(SearchRelaxation::Sigmoid),
        false => {
            case.choice("relaxation", &[("sigmoid", SearchRelaxation::Sigmoid), ("softmax", SearchRelaxation::Softmax)])
        }
    }
}

fn discretise(case: &Case) -> Outcome {
    let (logits, relaxation) = (rows(case, "theta")?, relaxation(case)?);
    let mut count = 0;
    for name in case.names() {
        let (scope, rho) = match name.split_once('.') {
            Some(("row", rho)) => (SearchScope::Row, rho),
            Some(("global", rho)) => (SearchScope::Global, rho),
            _ if name == "theta" => continue,
            _ => return Err(format!("{name} is unknown")),
        };
        let rho: f64 = rho.parse().map_err(|_| format!("{name} names no fraction"))?;
        near(case, &name, &flags(&selected_layers(&logits, relaxation, rho, scope)), 0.0)?;
        count += 1;
    }
    Ok(format!("{count} choices are equal"))
}

/// Batches of a step of the search, and the losses of the held-out ones.
struct Batches<'a> {
    case: &'a Case,
    step: usize,
    held_out: &'a mut Vec<f32>,
}

impl Batches<'_> {
    fn gradients(&self, net: &Net, part: &str) -> Result<(f32, GradientsParams), String> {
        let [x, y] = ["x", "y"].map(|name| format!("{part}_{name}.{}", self.step));
        let loss = net.loss(self.case, &x, &y)?;
        Ok((host(loss.clone().inner())[0], GradientsParams::from_grads(loss.backward(), net)))
    }
}

impl Losses<Net> for Batches<'_> {
    fn training(&mut self, net: &Net) -> Result<GradientsParams, HookError> {
        Ok(self.gradients(net, "train")?.1)
    }

    fn held_out(&mut self, net: &Net) -> Result<GradientsParams, HookError> {
        let (loss, grads) = self.gradients(net, "val")?;
        self.held_out.push(loss);
        Ok(grads)
    }
}

fn search(case: &Case) -> Outcome {
    let first = rows(case, "theta.0")?;
    let (count, modules) = (first.len(), first[0].len());
    let order = case.choice("order", &[("first", SearchOrder::First), ("second", SearchOrder::Second)])?;
    let tolerance = if order == SearchOrder::Second { 1e-4 } else { 1e-5 };
    let options = DiffoRa {
        rho: case.number("rho")?,
        relaxation: relaxation(case)?,
        order,
        xi: (order == SearchOrder::Second).then(|| case.number("xi")).transpose()?,
        lr_theta: case.number("lr_theta")?,
        wd_theta: case.number("weight_decay_theta")?,
        sharing: lowrank_models::adapter::Sharing::None,
        ..DiffoRa::default()
    };
    let betas = |place: usize| case.config["betas"][place].as_f64().ok_or("configuration: betas");
    if [betas(0)?, betas(1)?] != [0.9, 0.999] || case.number("eps")? != 1e-8 {
        return Err("configuration: betas or eps are not those of the logits' optimizer".into());
    }
    let mut net = net(case, [count, modules], |row, module| {
        let names = ["A", "B"].map(|factor| format!("l{row}.m{module}.{factor}.0"));
        (names, 0.0, first[row][module] as f32)
    })?;
    let mut search = DifforaSearch::new(options, &net, "default").map_err(|error| error.to_string())?;
    net = search.apply(net);
    let mut optimizer = AdamWConfig::new()
        .with_beta_1(betas(0)?)
        .with_beta_2(betas(1)?)
        .with_epsilon(case.number("eps")?)
        .with_weight_decay(case.number("weight_decay_w")?)
        .init();
    let steps = (0..).take_while(|step| case.has(&format!("train_x.{step}"))).count();
    for step in 0..=steps {
        let logits = search.logits(&net).concat().iter().map(|logit| *logit as f32).collect::<Vec<_>>();
        near(case, &format!("theta.{step}"), &logits, tolerance)?;
        for (path, own) in adapters(&net) {
            let parts: Vec<&str> = path.split('.').collect();
            let name = |factor: &str| format!("l{}.m{}.{factor}.{step}", parts[1], parts[3]);
            near(case, &name("A"), &host(own.a.val().inner().transpose()), tolerance)?;
            near(case, &name("B"), &host(own.b.val().inner().transpose()), tolerance)?;
        }
        if step == steps {
            break;
        }
        let name = |what: &str| format!("{what}.{step}");
        let mut losses = Vec::new();
        let found = {
            let mut batches = Batches { case, step, held_out: &mut losses };
            search.gradients(&net, 0.0, &mut batches).map_err(|error| error.to_string())?
        };
        near(case, &name("val_loss"), &losses, tolerance)?;
        let found = found.concat();
        near(case, &name("grad_theta"), &found.iter().map(|grad| *grad as f32).collect::<Vec<_>>(), tolerance)?;
        let rows: Vec<Vec<f64>> = found.chunks(modules).map(<[f64]>::to_vec).collect();
        net = search.update(net, &rows);
        let loss = net.loss(case, &name("train_x"), &name("train_y"))?;
        near(case, &name("train_loss"), &host(loss.clone().inner()), tolerance)?;
        let mut grads = GradientsParams::from_grads(loss.backward(), &net);
        for own in adapters(&net).into_values() {
            grads.remove::<1>(own.gamma.id);
        }
        net = optimizer.step(case.number("lr_w")?, net, grads);
    }
    let weights = search.weights(&net).concat().iter().map(|weight| *weight as f32).collect::<Vec<_>>();
    near(case, "gamma_final", &weights, tolerance)?;
    let selected: Vec<Vec<bool>> =
        search.selected(&net).chunks(modules).map(|row| row.iter().map(|(_, on)| *on).collect()).collect();
    near(case, "dam_row", &flags(&selected), 0.0)?;
    Ok(format!("{steps} steps of the search and its choice are equal"))
}

fn sharing(case: &Case) -> Outcome {
    let dam = rows(case, "dam")?;
    let (count, modules) = (dam.len(), dam[0].len());
    let own = |row: usize, module: usize| dam[row][module] != 0.0;
    let prefix = |row: usize, module: usize| match own(row, module) {
        true => format!("l{row}.m{module}"),
        false => format!("shared.m{module}"),
    };
    let net = net(case, [count, modules], |row, module| {
        (["A", "B"].map(|factor| format!("{}.{factor}", prefix(row, module))), 1.0, 0.0)
    })?;
    let place = |path: &str| -> (usize, usize) {
        let numbers: Vec<usize> = path.split('.').filter_map(|part| part.parse().ok()).collect();
        (numbers[0], numbers[1])
    };
    let is_selected = |path: &str| {
        let (row, module) = place(path);
        own(row, module)
    };
    let pairs = SharedPairs::of(&net, "default", &is_selected).map_err(|error| error.to_string())?;
    let y = net.forward(batch(case, "x")?);
    near(case, "y", &host(y.inner()), 1e-5)?;
    let loss = net.loss(case, "x", "target")?;
    near(case, "loss", &host(loss.clone().inner()), 1e-5)?;
    let mut grads = pairs.gather(GradientsParams::from_grads(loss.backward(), &net));
    let followers = pairs.followers();
    let mut trained = 0;
    for (path, own) in adapters(&net) {
        let (row, module) = place(&path);
        for (factor, tensor) in [("A", &own.a), ("B", &own.b)] {
            match (followers.contains(&tensor.id), grads.remove::<2>(tensor.id)) {
                (true, None) => {}
                (false, Some(grad)) => {
                    let name = format!("grad.{}.{factor}", prefix(row, module));
                    near(case, &name, &host(grad.transpose()), 1e-5)?;
                    trained += tensor.dims().iter().product::<usize>();
                }
                (follows, grad) => {
                    return Err(format!("{path} {factor}: follows {follows}, gradient {}", grad.is_some()));
                }
            }
        }
    }
    near(case, "trainable_parameters", &[trained as f32], 0.0)?;
    let following = pairs.following(&net);
    for (path, own) in adapters(&net) {
        for tensor in [&own.a, &own.b] {
            if let Some(value) = following.get(&tensor.id)
                && host(value.clone()) != host(tensor.val().inner())
            {
                return Err(format!("{path} does not follow the first layer of its type"));
            }
        }
    }
    let together = merged(net).map_err(|error| error.to_string())?;
    for (row, layers) in together.rows.iter().enumerate() {
        for (module, layer) in layers.modules.iter().enumerate() {
            let name = format!("l{row}.m{module}.merged_W");
            near(case, &name, &host(layer.weight.val().inner().transpose()), 1e-5)?;
        }
    }
    Ok("output, gradients, count and merged weights are equal".into())
}
