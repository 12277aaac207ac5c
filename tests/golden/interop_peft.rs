//! Adapter folders written by `peft`: read, run, written back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use lowrank_models::adapter::{adapters_of, each_adapter, merged};
use lowrank_models::hub::ModelFolder;
use lowrank_models::hub::peft::{Form, PeftFolder, save};
use lowrank_models::{Dense, Llama, ids_tensor};
use safetensors::SafeTensors;

use super::support::case::{Array, Case, Outcome, host};

/// The linear layers of a LLaMA, those that a case has.
#[derive(Module, Debug)]
struct Layers {
    model: Body,
}

#[derive(Module, Debug)]
struct Body {
    layers: Vec<Block>,
}

#[derive(Module, Debug)]
struct Block {
    self_attn: Attention,
    mlp: Mlp,
}

#[derive(Module, Debug)]
struct Attention {
    q_proj: Option<Dense>,
    k_proj: Option<Dense>,
    v_proj: Option<Dense>,
    o_proj: Option<Dense>,
}

#[derive(Module, Debug)]
struct Mlp {
    gate_proj: Option<Dense>,
    up_proj: Option<Dense>,
    down_proj: Option<Dense>,
}

impl Block {
    fn layer(&self, name: &str) -> Option<&Dense> {
        match name {
            "self_attn.q_proj" => self.self_attn.q_proj.as_ref(),
            "self_attn.k_proj" => self.self_attn.k_proj.as_ref(),
            "self_attn.v_proj" => self.self_attn.v_proj.as_ref(),
            "self_attn.o_proj" => self.self_attn.o_proj.as_ref(),
            "mlp.gate_proj" => self.mlp.gate_proj.as_ref(),
            "mlp.up_proj" => self.mlp.up_proj.as_ref(),
            "mlp.down_proj" => self.mlp.down_proj.as_ref(),
            _ => None,
        }
    }
}

impl Layers {
    fn of(case: &Case) -> Result<Self, String> {
        let block = |number: usize| -> Result<Block, String> {
            let layer = |name: &str| -> Result<Option<Dense>, String> {
                let name = format!("base.model.layers.{number}.{name}.weight");
                let dense = |array: Array| Dense::from_parts(array.tensor::<2>().transpose(), None);
                if case.has(&name) { Ok(Some(dense(case.array(&name)?))) } else { Ok(None) }
            };
            Ok(Block {
                self_attn: Attention {
                    q_proj: layer("self_attn.q_proj")?,
                    k_proj: layer("self_attn.k_proj")?,
                    v_proj: layer("self_attn.v_proj")?,
                    o_proj: layer("self_attn.o_proj")?,
                },
                mlp: Mlp {
                    gate_proj: layer("mlp.gate_proj")?,
                    up_proj: layer("mlp.up_proj")?,
                    down_proj: layer("mlp.down_proj")?,
                },
            })
        };
        let layers = (0..case.count("layers")?).map(block).collect::<Result<_, _>>()?;
        Ok(Self { model: Body { layers } })
    }

    fn weight(&self, path: &str) -> Result<Tensor<2>, String> {
        let inner = path.strip_prefix("model.layers.").and_then(|path| path.split_once('.'));
        let layer = inner.and_then(|(number, name)| self.model.layers.get(number.parse::<usize>().ok()?)?.layer(name));
        layer.map(|layer| layer.weight.val()).ok_or_else(|| format!("there is no layer {path}"))
    }
}

/// The folder beside a case under its name without `_expected`: its merged weights and scales.
pub fn folder(case: &Case) -> Outcome {
    let stem = case.path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let name = stem.strip_suffix("_expected").ok_or("no folder belongs to a case of this name")?;
    let dir = case.path.with_file_name(name);
    let open = || PeftFolder::open(&dir).map_err(|error| error.to_string());
    let warnings = open()?.warnings;
    let (layers, _) = open()?.attach_to(Layers::of(case)?).map_err(|error| error.to_string())?;
    let mut scales = BTreeMap::new();
    each_adapter(&layers, |path, adapter| {
        let structure = adapter.stack[0].structure();
        // A product of factors with a scale beside them: the update over the bare product.
        scales.insert(path.to_string(), (structure.as_factors(), adapter.stack[0].tensors()));
    });
    for name in case.names().iter().filter(|name| name.starts_with("scale.")) {
        let (factors, tensors) = &scales[name.trim_start_matches("scale.")];
        let [_, scaled] = factors.clone().ok_or("the adapter has no scale")?;
        let (_, bare) = tensors.iter().find(|(tensor, _)| tensor.field == "b").ok_or("the adapter has no b")?;
        let bare: Vec<f32> = bare.clone().try_into_vec().map_err(|error| format!("{error:?}"))?;
        let norm = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
        let scale = norm(&host(scaled)) / norm(&bare);
        case.array(name)?.near(name, &[scale as f32], 0.0, 1e-6)?;
    }
    written_back(&layers, &dir)?;
    let layers = merged(layers).map_err(|error| error.to_string())?;
    for name in case.names() {
        let Some(path) = name.strip_prefix("merged.").and_then(|name| name.strip_suffix(".weight")) else { continue };
        let expected = case.array(&name)?;
        let ours = host(layers.weight(path)?.transpose());
        expected.near(&name, &ours, 1e-6 * expected.largest(), 0.0)?;
    }
    Ok(format!("merged weights are equal, the folder is written back bit for bit; warnings: {warnings:?}"))
}

/// Writes the only adapter of a module: the same names, shapes and bits as in the folder it came from.
pub fn written_back<M: Module>(module: &M, dir: &Path) -> Result<(), String> {
    let again = tempfile::tempdir().map_err(|error| error.to_string())?;
    let name = adapters_of(module)[0].name().to_string();
    for form in [Form::Peft, Form::Own] {
        save(module, &name, form, None, again.path()).map_err(|error| error.to_string())?;
        let read = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).map_err(|error| error.to_string());
        let (before, after) = (read(dir)?, read(again.path())?);
        let open = |bytes| SafeTensors::deserialize(bytes).map_err(|error| error.to_string());
        let (before, after) = (open(&before)?, open(&after)?);
        // peft writes what all layers share once more for each of them.
        let copy = |name: &str| {
            let shared = name.strip_prefix("base_model.model.").and_then(|inner| inner.rsplit_once('.'));
            shared.is_some_and(|(_, field)| before.tensor(&format!("base_model.{field}")).is_ok())
        };
        let mut names = (before.names(), after.names());
        names.0.retain(|name| !copy(name));
        names.0.sort();
        names.1.sort();
        if names.0 != names.1 {
            return Err(format!("{form:?}: {:?} were written for {:?}", names.1, names.0));
        }
        for name in names.0 {
            let (before, after) = (before.tensor(name).expect("listed"), after.tensor(name).expect("listed"));
            if (before.shape(), before.dtype(), before.data()) != (after.shape(), after.dtype(), after.data()) {
                return Err(format!("{form:?}: {name} was written with other bits"));
            }
        }
    }
    Ok(())
}

/// Logits of a model with each of the adapter folders beside the case, and with each merged.
pub fn run(case: &Case) -> Outcome {
    let beside = |name: &str| -> PathBuf { case.path.with_file_name(name) };
    let device = Device::default();
    let fail = |error: lowrank_models::ModelError| error.to_string();
    let load = || ModelFolder::open(&beside("model")).and_then(|folder| folder.load(&device)).map_err(fail);
    let ids = case.array("input_ids")?;
    let logits = |model: &Llama| host(model.logits(ids_tensor(&ids.i32(), ids.shape[0], &device), None));
    let bare = load()?;
    let base = logits(&bare);
    case.array("base_logits")?.near("base_logits", &base, 1e-4, 0.0)?;
    let mut read = Vec::new();
    for name in case.names() {
        let Some(adapter) = name.strip_suffix(".logits") else { continue };
        let folder = PeftFolder::open(&beside(adapter)).map_err(fail)?;
        let (model, report) = folder.attach(load()?).map_err(fail)?;
        case.array(&name)?.near(&name, &logits(&model), 1e-4, 0.0)?;
        report.control.switch(false);
        if logits(&model) != base {
            return Err(format!("{adapter}: switched off, the logits are not those of the base"));
        }
        report.control.switch(true);
        match report.layers[0].place.init.as_str() {
            "default" => written_back(&model, &beside(adapter))?,
            // What began as part of the base is written as plain LoRA.
            _ => {
                let again = tempfile::tempdir().map_err(|error| error.to_string())?;
                save(&model, "default", Form::Peft, None, again.path()).map_err(fail)?;
                let base = load()?;
                let (plain, _) = PeftFolder::open(again.path()).and_then(|folder| folder.attach(base)).map_err(fail)?;
                case.array(&name)?.near(&name, &logits(&plain), 1e-4, 0.0)?;
            }
        }
        let model = merged(model).map_err(|error| error.to_string())?;
        let name = format!("{adapter}.merged_logits");
        case.array(&name)?.near(&name, &logits(&model), 1e-4, 0.0)?;
        read.push(adapter.to_string());
    }
    if read.is_empty() {
        return Err("no adapter could be read".into());
    }
    Ok(format!("logits with {} are equal", read.join(", ")))
}
