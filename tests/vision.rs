//! Vision transformers: in the engine, under every adapter, and through the program.

#[path = "pictures.rs"]
mod pictures;
#[path = "program.rs"]
mod program;
#[allow(dead_code)] // its model is a LLaMA
#[path = "small_adapters.rs"]
mod small_adapters;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use burn::optim::SgdConfig;
use burn::tensor::{Device, Tensor, TensorData};
use lowrank_models::adapter::{Attach, BaseGradients, merged};
use lowrank_models::analysis::collect_gradients;
use lowrank_models::hub::peft::{Form, PeftFolder, save};
use lowrank_models::vit::{ClipConfig, ClipVisionConfig, EncoderConfig, ImageShape};
use lowrank_models::{
    ClipClassifier, ClipClassifierConfig, Dense, ImageBatch, ImageClassifier, Rows, VisionTransformer, VitConfig,
};
use lowrank_optim::Hooks;
use lowrank_train::build::Architecture;
use lowrank_train::data::DataError;
use lowrank_train::data::images::{Augment, ImageSet, ImageSettings};
use lowrank_train::engine::{BackwardMode, Schedule, Trainer, TrainerOptions};
use lowrank_train::objective::{ImageStream, Stream, StreamBatch, Streams};
use lowrank_train::recipe::ImageModel;
use pictures::{draw, tiny};
use program::{Workshop, checkpoints, metrics, refused, succeeded, summary, tensors};
use small_adapters::{all, apart};

fn config() -> VitConfig {
    let named = VitConfig::named("vit-micro", ["a", "b", "c"].map(String::from).to_vec()).expect("a shape");
    VitConfig {
        encoder: EncoderConfig {
            hidden_size: 32,
            intermediate_size: 48,
            num_hidden_layers: 2,
            initializer_range: 0.1,
            ..named.encoder
        },
        image: ImageShape { image_size: 16, patch_size: 8, num_channels: 3 },
        ..named
    }
}

fn model() -> VisionTransformer {
    VisionTransformer::random(&config(), 5, &Device::default().autodiff()).expect("a model")
}

fn clip() -> ClipClassifier {
    let VitConfig { encoder, image, labels, .. } = config();
    let clip = ClipConfig::of_vision(ClipVisionConfig { encoder, image, projection_dim: 8 });
    let config = ClipClassifierConfig { clip, labels };
    ClipClassifier::random(&config, 5, &Device::default().autodiff()).expect("a model")
}

/// Images that follow from their position.
struct Images;

impl Stream<ImageBatch> for Images {
    fn batch(&self) -> usize {
        4
    }

    fn rows(&self) -> u64 {
        16
    }

    fn at(&self, position: u64, device: &Device) -> Result<StreamBatch<ImageBatch>, DataError> {
        let value = |i: usize| ((position as usize * 97 + i * i + 7 * i) as f32 * 0.37).sin();
        let pixels: Vec<f32> = (0..4 * 3 * 256).map(value).collect();
        let labels: Vec<i32> = (0..4).map(|row| ((position as i32) / 4 + row) % 3).collect();
        let batch = ImageBatch {
            pixels: Tensor::from_data(TensorData::new(pixels, [4, 3, 16, 16]), device),
            labels: Tensor::from_data(TensorData::new(labels, [4]), device),
        };
        Ok(StreamBatch { counted: 4, batch, tags: Vec::new() })
    }
}

fn images() -> ImageBatch {
    Images.at(0, &Device::default()).expect("images").batch
}

fn logits(model: &impl ImageClassifier) -> Vec<f32> {
    model.valid().logits(images().pixels).into_data().try_into_vec().expect("f32")
}

/// The model after some steps, and the losses.
fn trained<M: ImageModel>(model: M, backward: BackwardMode) -> (M, Vec<f64>) {
    let options = TrainerOptions { backward, ..TrainerOptions::new(Schedule::constant(0.05)) };
    let mut trainer = Trainer::new(model, SgdConfig::new().init(), Hooks::new(), options);
    let streams = Streams::one(&Images);
    let losses = (0..3).map(|_| trainer.step(&streams, &mut |_, _| ()).expect("a step").loss).collect();
    (trainer.model().clone(), losses)
}

#[test]
fn whole_checkpointed_and_per_layer_steps_have_the_same_numbers() {
    same_numbers_in_every_mode(model);
    same_numbers_in_every_mode(clip);
}

fn same_numbers_in_every_mode<M: ImageModel>(model: fn() -> M) {
    let (whole, losses) = trained(model(), BackwardMode::Whole);
    assert!(losses[0].is_finite() && apart(&logits(&whole), &logits(&model())) > 1e-3);
    for mode in [BackwardMode::Checkpointed, BackwardMode::PerLayer] {
        let (other, found) = trained(model(), mode);
        assert!(losses.iter().zip(&found).all(|(a, b)| (a - b).abs() <= 1e-6 * a), "{losses:?} and {found:?}");
        assert!(apart(&logits(&other), &logits(&whole)) < 1e-5, "{mode:?}");
    }
    assert_eq!(M::counted(&images()), images().rows() as u64);
}

#[test]
fn every_structure_learns_beside_the_classifier_and_survives_its_folder() {
    learns_and_survives(model, |model| &model.classifier);
    learns_and_survives(clip, |model| &model.classifier);
}

fn learns_and_survives<M: ImageModel>(model: fn() -> M, classifier: fn(&M) -> &Dense) {
    for config in all() {
        let name = format!("{} {}", config.structure, config.init);
        let needs = config.initialisation().is_some_and(|init| init.needs_gradients);
        let gradients = match needs {
            true => collect_gradients(&model(), &config, 4, [images()]).expect("gradients"),
            false => BaseGradients::new(),
        };
        let attach = Attach::new(config.clone()).with_gradients(gradients);
        let (start, _) = M::attach(model(), attach).unwrap_or_else(|error| panic!("{name}: {error}"));
        let start = start.with_trained_classifier();
        let (whole, _) = trained(start.clone(), BackwardMode::Whole);
        let (blocks, _) = trained(start.clone(), BackwardMode::PerLayer);
        assert!(apart(&logits(&blocks), &logits(&whole)) < 1e-4, "{name}: per layer and whole differ");
        assert!(apart(&logits(&whole), &logits(&start)) > 1e-5, "{name} did not learn");
        let weights = |model: &M| classifier(model).weight.val().into_data();
        assert_ne!(weights(&whole), weights(&start), "{name}: the classifier did not learn");

        let dir = tempfile::tempdir().expect("a folder");
        save(&whole, "default", Form::Own, None, dir.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let settings = std::fs::read_to_string(dir.path().join("adapter_config.json")).expect("a file");
        assert!(settings.contains("\"classifier\"") && settings.contains("\"task_type\": null"), "{settings}");
        let folder = PeftFolder::open(dir.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (again, _) = folder.attach_by(model(), M::attach).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(logits(&again), logits(&whole), "{name} is not read as it was written");
        if let Ok(merged) = merged(whole.clone()) {
            assert!(apart(&logits(&merged), &logits(&whole)) < 1e-4, "{name} merged");
        }
    }
}

fn newest(shop: &Workshop, run: &str) -> String {
    checkpoints(&shop.path(run)).pop().expect("a checkpoint").to_str().expect("a path").to_string()
}

fn accuracy(text: &[u8]) -> f64 {
    let text = String::from_utf8_lossy(text).into_owned();
    let line = text.lines().find(|line| line.starts_with("accuracy")).unwrap_or_else(|| panic!("{text}"));
    line.trim_start_matches("accuracy").trim().trim_end_matches(" %").parse().expect("a number")
}

#[test]
fn a_model_is_pretrained_adapted_measured_merged_and_embedded() {
    let shop = Workshop::new(0);
    draw(&shop, "images", &["red", "green", "blue"], 12);
    let changed = [
        "--steps",
        "24",
        "--set",
        "data.images.flip=true",
        "--set",
        "data.images.crop=0.8",
        "--set",
        "data.images.rotate=10",
    ];
    succeeded(shop.run(&tiny("pretrain", "vit-micro", "whole", "images", &changed)));
    let base = newest(&shop, "whole");
    let found = summary(&shop.path("whole"));
    assert!(found["validation_accuracy"].as_f64().unwrap() > 0.6, "{found}");
    assert!(metrics(&shop.path("whole")).iter().any(|line| line["accuracy"].is_number()));
    for name in ["config.json", "model.safetensors", "preprocessor_config.json"] {
        assert!(Path::new(&base).join(name).exists(), "{name}");
    }

    // Stopped in the middle and resumed, the bits are the same.
    let half = ["--steps", "24", "--set", "checkpoint.every=12", "--set", "checkpoint.keep_last=9"];
    succeeded(shop.run(&tiny("pretrain", "vit-micro", "halves", "images", &[&changed[2..], &half].concat())));
    let saved = checkpoints(&shop.path("halves"));
    let whole = tensors(&saved[saved.len() - 1]);
    succeeded(shop.run(&["pretrain", "--quiet", "--resume-from", "step-000012", "--out", "halves"]));
    assert!(tensors(saved.last().unwrap()) == whole, "resumed, the bits are other ones");

    // Other classes: a new classifier beside an adapter.
    draw(&shop, "more", &["red", "green", "blue", "cyan"], 12);
    let adapter = ["--rank", "4", "--epochs", "8", "--backward", "per-layer", "--set", "optimizer.clip=0"];
    succeeded(shop.run(&tiny("finetune", &base, "tuned", "more", &adapter)));
    let tuned = newest(&shop, "tuned");
    assert!(Path::new(&tuned).join("labels.json").exists());
    let measured =
        succeeded(shop.run(&["eval", "--quiet", "--model", &base, "--adapter", &tuned, "--data", "more"])).stdout;
    assert!(accuracy(&measured) > 60.0, "{}", String::from_utf8_lossy(&measured));
    assert!(String::from_utf8_lossy(&measured).contains("class cyan"));
    succeeded(shop.run(&["merge", "--model", &base, "--adapter", &tuned, "--out", "merged"]));
    let merged = succeeded(shop.run(&["eval", "--quiet", "--model", "merged", "--data", "more"])).stdout;
    assert_eq!(accuracy(&merged), accuracy(&measured));
    // For peft, with its classes.
    succeeded(shop.run(&["export", "--model", &base, "--adapter", &tuned, "--out", "exported"]));
    let config = std::fs::read_to_string(shop.path("exported/adapter_config.json")).expect("a configuration");
    assert!(config.contains("LORA") && config.contains("classifier"), "{config}");
    let args = ["eval", "--quiet", "--model", &base, "--adapter", "exported", "--data", "more"];
    assert_eq!(accuracy(&succeeded(shop.run(&args)).stdout), accuracy(&measured));
    for (folder, parts) in [("merged", ["vit", "classifier.weight"]), ("exported", ["lora", "classifier"])] {
        let shown = String::from_utf8(succeeded(shop.run(&["inspect", folder])).stdout).expect("text");
        assert!(parts.iter().all(|part| shown.contains(part)), "{shown}");
    }
    // It is trained on, and its classifier with it.
    let on = ["--adapter", tuned.as_str(), "--steps", "2"];
    succeeded(shop.run(&tiny("finetune", &base, "further", "more", &on)));

    let embed = ["embed", "--quiet", "--model", "merged", "--data", "more", "--out", "e.safetensors"];
    succeeded(shop.run(&embed));
    let bytes = std::fs::read(shop.path("e.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("embeddings").unwrap().shape(), [48, 16]);
    assert_eq!(file.tensor("labels").unwrap().shape(), [48]);
    refused(&shop.run(&embed), &["e.safetensors", "exists"]);
}

#[test]
fn a_clip_is_adapted_or_trained_whole_to_classes_of_its_own() {
    for kind in ["clip", "clip_vision"] {
        let shop = Workshop::new(0);
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/interop-vit").join(kind);
        let base = base.to_str().expect("a path");
        draw(&shop, "images", &["red", "green", "blue"], 12);
        let adapter =
            ["--rank", "4", "--epochs", "8", "--set", "checkpoint.every=12", "--set", "checkpoint.keep_last=9"];
        succeeded(shop.run(&tiny("finetune", base, "tuned", "images", &adapter)));
        let tuned = newest(&shop, "tuned");
        let before = tensors(Path::new(&tuned));
        succeeded(shop.run(&["finetune", "--quiet", "--resume-from", "step-000012", "--out", "tuned"]));
        assert!(tensors(Path::new(&tuned)) == before, "resumed, the bits are other ones");
        let measured = |args: &[&str]| {
            let args = [&["eval", "--quiet", "--data", "images"], args].concat();
            accuracy(&succeeded(shop.run(&args)).stdout)
        };
        let found = measured(&["--model", base, "--adapter", &tuned]);
        assert!(found > 60.0, "{kind}: {found}");
        refused(&shop.run(&["eval", "--quiet", "--data", "images", "--model", base]), &["finetune", "embed"]);

        succeeded(shop.run(&["merge", "--model", base, "--adapter", &tuned, "--out", "merged"]));
        assert_eq!(measured(&["--model", "merged"]), found);
        let text = std::fs::read_to_string(shop.path("merged/config.json")).expect("a configuration");
        assert!(text.contains("CLIPForImageClassification") && text.contains("\"green\""), "{text}");
        succeeded(shop.run(&["export", "--model", base, "--adapter", &tuned, "--out", "exported"]));
        assert_eq!(measured(&["--model", base, "--adapter", "exported"]), found);
        let embed = ["embed", "--quiet", "--model", "merged", "--data", "images", "--out", "e.safetensors"];
        succeeded(shop.run(&embed));

        // All weights, block by block, of the classifier and of the tower alone.
        for (from, out) in [("merged", "further"), (base, "whole")] {
            let all = ["--adapter", "none", "--steps", "8", "--backward", "per-layer", "--set", "optimizer.clip=0"];
            let all = [&all[..], &["--set", "checkpoint.every=4", "--set", "checkpoint.keep_last=9"]].concat();
            succeeded(shop.run(&tiny("finetune", from, out, "images", &all)));
            let whole = newest(&shop, out);
            let before = tensors(Path::new(&whole));
            succeeded(shop.run(&["finetune", "--quiet", "--resume-from", "step-000004", "--out", out]));
            assert!(tensors(Path::new(&whole)) == before, "{from}: resumed, the bits are other ones");
            assert!(measured(&["--model", &whole]) > 40.0);
        }
    }
}

#[test]
fn allocations_have_their_stages_on_images_too() {
    let shop = Workshop::new(0);
    draw(&shop, "images", &["red", "green"], 12);
    succeeded(shop.run(&tiny("pretrain", "vit-micro", "base", "images", &["--steps", "2"])));
    let base = newest(&shop, "base");
    let last = |run: &str, args: &[&str]| {
        succeeded(shop.run(&tiny("finetune", &base, run, "images", args)));
        checkpoints(&shop.path(run)).pop().and_then(|path| Some(path.file_name()?.to_owned())).expect("a checkpoint")
    };
    let thresholds = ["--allocation", "sora", "--steps", "3", "--set", "allocation.options.thresholds=[0.01, 0.02]"];
    assert_eq!(last("staged", &thresholds), "step-000006");
    let search = ["--allocation", "diffora", "--steps", "6", "--set", "allocation.options.search_steps=3"];
    assert_eq!(last("searched", &search), "step-000006");
    let selected = std::fs::read_to_string(shop.path("searched/modules.json")).expect("what was selected");
    assert!(selected.contains("modules"), "{selected}");
}

#[test]
fn domains_are_measured_and_lists_are_read() {
    let shop = Workshop::new(0);
    draw(&shop, "images", &["red", "green"], 10);
    let line = |number: usize| {
        let (class, domain) = (["red", "green"][number % 2], ["day", "night"][number / 10]);
        format!(
            "{{\"image\": \"images/{class}/{}.png\", \"label\": \"{class}\", \"domain\": \"{domain}\"}}",
            number / 2
        )
    };
    let lines: Vec<String> = (0..20).map(line).collect();
    std::fs::write(shop.path("list.jsonl"), lines.join("\n")).unwrap();
    succeeded(shop.run(&tiny("pretrain", "vit-micro", "run", "list.jsonl", &["--steps", "4"])));
    let model = newest(&shop, "run");
    let text = succeeded(shop.run(&["eval", "--quiet", "--model", &model, "--data", "list.jsonl"])).stdout;
    let text = String::from_utf8_lossy(&text);
    assert!(text.contains("domain day") && text.contains("domain night") && text.contains("class red"), "{text}");

    // Three of four images are of the day, and each batch has as many of the night.
    let dark = |number: usize| if number.is_multiple_of(4) { "night" } else { "day" };
    let line = |number: usize| {
        let class = ["red", "green"][number % 2];
        let domain = dark(number);
        format!(
            "{{\"image\": \"images/{class}/{}.png\", \"label\": \"{class}\", \"domain\": \"{domain}\"}}",
            number / 2
        )
    };
    let lines: Vec<String> = (0..20).map(line).collect();
    std::fs::write(shop.path("uneven.jsonl"), lines.join("\n")).unwrap();
    let set = ImageSet::read(&[shop.path("uneven.jsonl")], &ImageSettings::vit(32), None, false).unwrap();
    let stream = ImageStream::new(Arc::new(set.clone()), 4).shuffled(Augment::default(), 3).balanced().unwrap();
    let mut seen = BTreeSet::new();
    for position in (0..60).step_by(4) {
        let batch = stream.at(position, &Device::default()).unwrap();
        let domains: Vec<&str> = batch.tags.iter().filter_map(|tag| tag.fields["domain"].as_str()).collect();
        assert_eq!(domains, ["day", "night", "day", "night"]);
        seen.extend(batch.batch.labels.into_data().iter::<i32>().map(|label| (position / 20, label)));
    }
    assert!(seen.len() >= 4, "both classes in every part: {seen:?}");
    let uneven = ImageStream::new(Arc::new(set.clone()), 3).shuffled(Augment::default(), 3).balanced();
    assert!(uneven.is_err_and(|reason| reason.contains("train.batch = 3") && reason.contains("day, night")));
    assert_eq!(set.clone().without_domain("night").unwrap().len(), 15);
    let run = |more: &[&str]| {
        shop.run(&tiny("pretrain", "vit-micro", "balanced", "uneven.jsonl", &[&["--steps", "2"], more].concat()))
    };
    refused(&run(&["--set", "data.images.leave_out=dusk"]), &["data.images.leave_out = dusk", "day, night"]);
    let both = ["--set", "data.images.balance_domains=true", "--set", "data.images.leave_out=night"];
    succeeded(run(&both));
    let tuned = ["--adapter", "pego", "--rank", "2", "--leave-out", "night", "--steps", "2"];
    succeeded(shop.run(&tiny("finetune", &newest(&shop, "run"), "tuned", "uneven.jsonl", &tuned)));
}

#[test]
fn broken_images_and_settings_are_refused_by_name() {
    let shop = Workshop::new(2);
    draw(&shop, "images", &["red", "green"], 8);
    let run = |data: &str, more: &[&str]| {
        let more = [&["--steps", "1"], more].concat();
        shop.run(&tiny("pretrain", "vit-micro", "out", data, &more))
    };
    let odd = shop.path("images/red/odd.png");
    let good = std::fs::read(shop.path("images/red/0.png")).unwrap();
    for (bytes, part) in [
        (b"a text".to_vec(), "neither PNG nor JPEG"),
        (good[..good.len() / 2].to_vec(), "cannot be decoded"),
        (Vec::new(), "neither"),
    ] {
        std::fs::write(&odd, bytes).unwrap();
        refused(&run("images", &[]), &["images/red/odd.png", part, "skip_broken"]);
    }
    succeeded(shop.run(&tiny(
        "pretrain",
        "vit-micro",
        "skipped",
        "images",
        &["--steps", "1", "--set", "data.images.skip_broken=true"],
    )));
    std::fs::remove_file(&odd).unwrap();
    std::fs::write(shop.path("images/notes.txt"), "x").unwrap();
    refused(&run("images", &[]), &["notes.txt", "move it"]);
    std::fs::remove_file(shop.path("images/notes.txt")).unwrap();
    refused(&run("nothing", &[]), &["nothing"]);
    std::fs::write(shop.path("bad.jsonl"), "{\"image\": \"images/red/0.png\", \"class\": 1}").unwrap();
    refused(&run("bad.jsonl", &[]), &["bad.jsonl line 1", "class"]);
    std::fs::write(shop.path("bare.jsonl"), "{\"image\": \"images/red/0.png\"}").unwrap();
    refused(&run("bare.jsonl", &[]), &["images/red/0.png", "no class"]);
    refused(&run("images", &["--set", "data.field=x"]), &["data.field", "vision transformer"]);
    refused(&run("images", &["--parameterization", "low-rank"]), &["model.parameterization.name"]);
    refused(&run("images", &["--set", "data.images.crop=0"]), &["data.images.crop"]);
    refused(&run("images", &["--set", "data.validation_fraction=0.01"]), &["validation_fraction"]);
    assert!(!shop.path("out").exists());
    refused(&shop.run(&shop.tiny("out", &["--set", "data.images.flip=true", "--steps", "1"])), &["data.images"]);
    refused(&shop.run(&tiny("finetune", "vit-micro", "out", "images", &["--steps", "1"])), &["vit-micro", "pretrain"]);

    let model = newest(&shop, "skipped");
    draw(&shop, "others", &["yellow"], 2);
    refused(&shop.run(&["eval", "--quiet", "--model", &model, "--data", "others"]), &["yellow", "red"]);
    refused(&shop.run(&["eval", "--quiet", "--model", &model]), &["--data"]);
    std::fs::remove_file(Path::new(&model).join("preprocessor_config.json")).unwrap();
    refused(&shop.run(&["eval", "--quiet", "--model", &model, "--data", "images"]), &["preprocessor_config.json"]);
}
