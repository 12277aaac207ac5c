//! Model folders written by `transformers`, one of each family: logits, loss, gradients and greedy continuations, or a refusal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use lowrank_models::hub::gguf::{TensorType, save_gguf};
use lowrank_models::hub::{Generation, MAX_SHARD_BYTES, ModelFolder, save_as};
use lowrank_models::{
    ForwardPass, LanguageBatch, Llama, ModelError, RopeScaling, Sampling, Segment, SegmentedModel, Walker,
    WeightedLoss, generate, ids_tensor, walk,
};
use lowrank_optim::ModulePath;

use super::support::case::{Array, Case, Outcome, host};

/// Opens the folder beside a case, or meets its refusal.
pub fn run(case: &Case) -> Outcome {
    let dir = case.path.with_file_name(case.word("folder")?);
    match case.word("kind")? {
        "refuse" => refused(case, &dir),
        "logits" => opened(case, &dir),
        other => Err(format!("configuration: kind is \"{other}\"")),
    }
}

fn load(dir: &Path, device: &Device) -> Result<(ModelFolder, Llama), String> {
    let folder = ModelFolder::open(dir).map_err(|error| error.to_string())?;
    let model = folder.load(device).map_err(|error| error.to_string())?;
    Ok((folder, model))
}

fn refused(case: &Case, dir: &Path) -> Outcome {
    let words = case.config["mention"].as_array().ok_or("configuration: mention is not a list")?;
    let words: Vec<String> = words.iter().filter_map(|word| Some(word.as_str()?.to_lowercase())).collect();
    match ModelFolder::open(dir).and_then(|folder| folder.load(&Device::default())) {
        Ok(_) => Err("the folder was opened".into()),
        Err(error) if !error.is_input() => Err(format!("not reported as bad input: {error}")),
        Err(error) => {
            let message = error.to_string();
            let mentioned = words.iter().any(|word| message.to_lowercase().contains(word));
            if mentioned { Ok(message) } else { Err(format!("none of {words:?} is in \"{message}\"")) }
        }
    }
}

fn opened(case: &Case, dir: &Path) -> Outcome {
    let device = Device::default().autodiff();
    let (folder, model) = load(dir, &device)?;
    let plain = model.valid();
    let ids = case.array("input_ids")?;
    let batch = |ids: &Array| ids_tensor(&ids.i32(), ids.shape[0], &device.clone().inner());
    let worst = case.array("logits")?.near("logits", &host(plain.logits(batch(&ids), None)), 1e-4, 0.0)?;
    if case.has("logits.short") {
        let expected = case.array("logits.short")?;
        let short = plain.logits(batch(&ids).narrow(1, 0, expected.shape[1]), None);
        expected.near("logits.short", &host(short), 1e-4, 0.0)?;
    }
    let targets = targets(&case.array("labels")?);
    let counted = targets.values.iter().filter(|target| **target != -100.0).count() as f64;
    let batch_of = LanguageBatch { inputs: batch(&ids), targets: batch(&targets), starts: None };
    let loss = model.mean_loss(batch_of.clone());
    case.array("loss")?.near("loss", &host(loss.clone().inner()), 1e-5, 0.0)?;
    let whole = gradients(&model, &GradientsParams::from_grads(loss.backward(), &model));
    let by_block = gradients(&model, &walked(&model, &batch_of, 1.0 / counted));
    for (name, expected) in gradients_of(case)? {
        for (mode, found) in [("whole", &whole), ("checkpointed", &by_block)] {
            let ours = found.get(&name).ok_or_else(|| format!("{name} has no gradient"))?;
            expected.near(&format!("{mode} grad.{name}"), ours, 1e-4 * expected.largest(), 0.0)?;
        }
    }
    let mut remark = format!("logits within {worst:.1e}");
    if case.has("generated") {
        generated(case, &folder, &plain, dir)?;
        remark.push_str(", same continuations");
    }
    written_back(case, &folder, &plain, &ids)?;
    remark.push_str(&through_gguf(&plain, &ids)?);
    Ok(remark)
}

/// The model written as GGUF and read again has the same logits; what the format has no place for is rejected.
fn through_gguf(model: &Llama, ids: &Array) -> Outcome {
    let again = tempfile::tempdir().map_err(|error| error.to_string())?;
    let file = again.path().join("model.gguf");
    let config = model.config();
    let cut = config.features.sliding_window.is_some_and(|window| window < config.max_position_embeddings);
    let dynamic = matches!(config.rope_scaling, Some(RopeScaling::Dynamic { .. }));
    // A folder without a tokenizer: those of the cases are of a kind that the format does not have.
    match save_gguf(model, TensorType::F32, again.path(), "model", &file) {
        Err(ModelError::Config(reason)) if cut && reason.contains("sliding_window") => {
            return Ok(format!("; {reason}"));
        }
        Err(ModelError::Config(reason)) if dynamic && reason.contains("rope_scaling") => {
            return Ok(format!("; {reason}"));
        }
        written => written.map_err(|error| format!("as GGUF: {error}"))?,
    };
    let (_, read) = load(&file, &Device::default())?;
    let logits = |model: &Llama| host(model.logits(ids_tensor(&ids.i32(), ids.shape[0], &Device::default()), None));
    let (ours, expected) = (logits(&read), logits(model));
    let worst = ours.iter().zip(&expected).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
    // Constants are f32 in the file.
    if worst > 1e-5 {
        return Err(format!("the GGUF file that was written has logits that differ by {worst}"));
    }
    Ok("; the same as GGUF".into())
}

/// The labels of the tokens that follow; the file's labels are those of the inputs.
fn targets(labels: &Array) -> Array {
    let positions = labels.shape[1];
    let next = |place: usize| if (place + 1).is_multiple_of(positions) { -100.0 } else { labels.values[place + 1] };
    Array { shape: labels.shape.clone(), values: (0..labels.values.len()).map(next).collect() }
}

fn gradients_of(case: &Case) -> Result<BTreeMap<String, Array>, String> {
    let names = case.names();
    let grads = names.iter().filter_map(|name| Some((name, name.strip_prefix("grad.")?)));
    let grads: Result<BTreeMap<_, _>, String> =
        grads.map(|(name, weight)| Ok((weight.to_string(), case.array(name)?))).collect();
    match grads {
        Ok(grads) if grads.is_empty() => Err("the case has no gradient".into()),
        grads => grads,
    }
}

/// Gradients of a weighted loss, collected block by block.
fn walked(model: &Llama, batch: &LanguageBatch, factor: f64) -> GradientsParams {
    struct Collect<'a> {
        model: &'a Llama,
        grads: GradientsParams,
    }
    impl Walker<Llama> for Collect<'_> {
        type Error = ModelError;

        fn model(&self) -> &Llama {
            self.model
        }

        fn gradients(&mut self, segment: Segment, grads: GradientsParams) -> Result<(), ModelError> {
            struct Move<'a> {
                from: GradientsParams,
                into: &'a mut GradientsParams,
            }
            impl ModuleVisitor for Move<'_> {
                fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                    if let Some(grad) = self.from.remove::<D>(param.id) {
                        self.into.register(param.id, grad);
                    }
                }
            }
            self.model.visit_segment(segment, &mut Move { from: grads, into: &mut self.grads });
            Ok(())
        }
    }
    let sum = |model: &Llama, hidden: Tensor<3>| model.loss(hidden, batch);
    let pass = ForwardPass { batch, losses: vec![WeightedLoss { sum: &sum, factor }] };
    let mut collect = Collect { model, grads: GradientsParams::new() };
    walk(&[pass], Segment::Entry, &mut collect).expect("a walk that nothing ends");
    collect.grads
}

/// Gradients by the names and in the layout of the files.
fn gradients(model: &Llama, grads: &GradientsParams) -> BTreeMap<String, Vec<f32>> {
    struct Collector<'a> {
        grads: &'a GradientsParams,
        path: ModulePath,
        found: BTreeMap<String, Vec<f32>>,
    }
    impl ModuleVisitor for Collector<'_> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.path.enter(name, container);
        }

        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let Some(grad) = self.grads.get::<D>(param.id) else { return };
            let linear = D == 2 && self.path.containers().any(|container| container == "Struct:Dense");
            let values = if linear { host(grad.swap_dims(0, 1)) } else { host(grad) };
            self.found.insert(self.path.joined(), values);
        }
    }
    let mut collector = Collector { grads, path: ModulePath::default(), found: BTreeMap::new() };
    model.visit(&mut collector);
    collector.found
}

/// Greedy continuations with a cache and by whole passes, and one that ends where the folder says.
fn generated(case: &Case, folder: &ModelFolder, model: &Llama, dir: &Path) -> Result<(), String> {
    let rows = case.array("generated")?;
    let (prompt, new) = (case.count("prompt")?, case.count("new_tokens")?);
    let row = |number: usize| rows.at(number).i32();
    for number in 0..rows.shape[0] {
        let expected = row(number);
        let continued = generate(model, &expected[..prompt], new, &Sampling::greedy(), |_| true);
        let continued = continued.map_err(|error| error.to_string())?;
        if continued != expected[prompt..] {
            return Err(format!("row {number} continues with {continued:?} instead of {:?}", &expected[prompt..]));
        }
        for length in prompt..expected.len() {
            let ids = ids_tensor(&expected[..length], 1, &Device::default());
            let logits = host(model.logits(ids, None).narrow(1, length - 1, 1));
            let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]).then(b.cmp(a)));
            if best != Some(expected[length] as usize) {
                return Err(format!("a whole pass over {length} tokens of row {number} continues with {best:?}"));
            }
        }
    }
    if case.has("stopped") {
        let expected = case.array("stopped")?.i32();
        let generation = Generation::read(dir).map_err(|error| error.to_string())?;
        let ends = folder.config.end_tokens(&generation.ends);
        let goes_on = |id: i32| !ends.contains(&(id as u32));
        let continued = generate(model, &expected[..prompt], new, &Sampling::greedy(), goes_on);
        if continued.map_err(|error| error.to_string())? != expected[prompt..] {
            return Err("the continuation does not end where generation_config.json says".into());
        }
    }
    Ok(())
}

/// The folder written again in its own types: the same family and keys, the same bits.
fn written_back(case: &Case, folder: &ModelFolder, model: &Llama, ids: &Array) -> Result<(), String> {
    let fail = |error: ModelError| error.to_string();
    let again = tempfile::tempdir().map_err(|error| error.to_string())?;
    let types = folder.types().map_err(fail)?;
    save_as(model, &folder.config.extra, &types, again.path(), MAX_SHARD_BYTES).map_err(fail)?;
    let (read, same) = load(again.path(), &Device::default())?;
    if read.config != folder.config {
        return Err(format!("{:?} was written for {:?}", read.config, folder.config));
    }
    if let Some(file_type) = case.config["file_type"].as_str() {
        let text = std::fs::read_to_string(again.path().join("config.json")).map_err(|error| error.to_string())?;
        let config: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        if config["dtype"] != file_type {
            return Err(format!("dtype {} was written for {file_type}", config["dtype"]));
        }
    }
    let device = Device::default();
    let logits = |model: &Llama| host(model.logits(ids_tensor(&ids.i32(), ids.shape[0], &device), None));
    if logits(&same) != logits(model) {
        return Err("the folder that was written back has other logits".into());
    }
    let (before, after) = (tensors(&case.path.with_file_name(case.word("folder")?))?, tensors(again.path())?);
    for (name, bytes) in &after {
        if before.get(name) != Some(bytes) {
            return Err(format!("{name} was written back with other bits"));
        }
    }
    let tied = folder.config.llama.tie_word_embeddings;
    let lost = |name: &&String| {
        !(after.contains_key(*name) || name.ends_with("inv_freq") || tied && *name == "lm_head.weight")
    };
    match before.keys().find(lost) {
        Some(name) => Err(format!("{name} was not written back")),
        None => Ok(()),
    }
}

/// Types, shapes and bytes of the tensors of a folder.
fn tensors(dir: &Path) -> Result<BTreeMap<String, (String, Vec<u8>)>, String> {
    let files: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(|error| error.to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|end| end == "safetensors"))
        .collect();
    let mut found = BTreeMap::new();
    for path in files {
        let bytes = std::fs::read(&path).map_err(|error| error.to_string())?;
        let file = safetensors::SafeTensors::deserialize(&bytes).map_err(|error| error.to_string())?;
        for (name, view) in file.tensors() {
            found.insert(name, (format!("{:?} {:?}", view.dtype(), view.shape()), view.data().to_vec()));
        }
    }
    Ok(found)
}
