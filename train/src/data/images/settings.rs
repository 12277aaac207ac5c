//! `preprocessor_config.json`: from pictures to the pixels of a model.

use std::path::Path;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::error::ImageError;
use super::picture::Picture;
use super::resample::{Filter, resized};

/// Name of the file in a model folder.
pub const PREPROCESSOR: &str = "preprocessor_config.json";

/// Size that a picture is brought to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// Exactly this height and width.
    Exact([usize; 2]),
    /// The shorter side has this length; proportions are kept.
    Shortest(usize),
}

/// Steps from a picture to the pixels of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageSettings {
    /// Size that a picture is brought to, and the filter; none to leave it as it is.
    pub resize: Option<(Size, Filter)>,
    /// Height and width of the part in the middle that is used; none for the whole picture.
    pub crop: Option<[usize; 2]>,
    /// Factor of the bytes.
    pub rescale: Option<f64>,
    /// Mean that is subtracted from each colour, and deviation that it is then divided by.
    pub normalise: Option<[[f64; 3]; 2]>,
}

/// Names of the two kinds of processors, without their variants.
const VIT: &str = "ViT";
const CLIP: &str = "CLIP";

impl ImageSettings {
    /// The usual settings of a vision transformer for square images.
    pub fn vit(side: usize) -> Self {
        Self {
            resize: Some((Size::Exact([side; 2]), Filter::Bilinear)),
            crop: None,
            rescale: Some(1.0 / 255.0),
            normalise: Some([[0.5; 3]; 2]),
        }
    }

    /// Reads the file of a model folder.
    pub fn read(folder: &Path) -> Result<Self, ImageError> {
        let path = folder.join(PREPROCESSOR);
        let bad = |problem: String| ImageError::Settings { path: path.clone(), problem };
        let text = std::fs::read_to_string(&path).map_err(|error| {
            bad(format!("{error}; the model's folder must hold the file that says how its images are prepared"))
        })?;
        Self::parse(&text).map_err(bad)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut map: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))?;
        let mut take = |key: &str| map.remove(key).filter(|value| !value.is_null());
        let kind = take("image_processor_type").or(take("feature_extractor_type"));
        let clip = match kind.as_ref().and_then(Value::as_str) {
            Some(name) if is_kind(name, CLIP) => true,
            Some(name) if is_kind(name, VIT) => false,
            _ => {
                let found = kind.unwrap_or(Value::Null);
                return Err(format!("image_processor_type is {found}; those of ViT and CLIP are supported"));
            }
        };
        let mut flag = |key: &str, default: bool| match take(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| format!("{key} is {value}; it must be true or false")),
        };
        let (resizes, crops) = (flag("do_resize", true)?, flag("do_center_crop", clip)?);
        let (rescales, normalises) = (flag("do_rescale", true)?, flag("do_normalize", true)?);
        for key in ["do_pad", "do_flip_channel_order", "do_reduce_labels"] {
            if flag(key, false)? {
                return Err(format!("{key} is true; it is not supported"));
            }
        }
        let size = take("size").unwrap_or_else(|| if clip { json!({"shortest_edge": 224}) } else { json!(224) });
        let crop_size = take("crop_size").unwrap_or(json!(224));
        let resample = take("resample").unwrap_or(json!(if clip { 3 } else { 2 }));
        let filter = || {
            serde_json::from_value::<Filter>(resample.clone())
                .map_err(|error| format!("resample is {resample}: {error}"))
        };
        let factor = take("rescale_factor").unwrap_or(json!(1.0 / 255.0));
        let factor = || factor.as_f64().ok_or_else(|| format!("rescale_factor is {factor}; it must be a number"));
        let usual: [[f64; 3]; 2] = match clip {
            true => [[0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_58, 0.275_777_11]],
            false => [[0.5; 3]; 2],
        };
        let mut colours = |key: &str, usual: [f64; 3]| match take(key) {
            None => Ok(usual),
            Some(value) => colours(&value)
                .ok_or_else(|| format!("{key} is {value}; it must be a number for each of three colours")),
        };
        let (mean, std) = (colours("image_mean", usual[0])?, colours("image_std", usual[1])?);
        if let Some(zero) = std.iter().find(|std| **std == 0.0 || !std.is_finite()) {
            return Err(format!("image_std has {zero}; nothing can be divided by it"));
        }
        Ok(Self {
            resize: if resizes { Some((target(&size, clip)?, filter()?)) } else { None },
            crop: match (crops, target(&crop_size, false)) {
                (false, _) => None,
                (true, Ok(Size::Exact(crop))) => Some(crop),
                (true, _) => return Err(format!("crop_size is {crop_size}; it must be a height and a width")),
            },
            rescale: if rescales { Some(factor()?) } else { None },
            normalise: normalises.then_some([mean, std]),
        })
    }

    /// The text of the file, as `transformers` writes it.
    pub fn to_json(&self) -> String {
        let name = if self.crop.is_some() { CLIP } else { VIT };
        let mut map = Map::from_iter([
            ("image_processor_type".to_string(), json!(format!("{name}ImageProcessor"))),
            ("do_resize".to_string(), json!(self.resize.is_some())),
            ("do_center_crop".to_string(), json!(self.crop.is_some())),
            ("do_rescale".to_string(), json!(self.rescale.is_some())),
            ("do_normalize".to_string(), json!(self.normalise.is_some())),
        ]);
        let sides = |[height, width]: [usize; 2]| json!({"height": height, "width": width});
        let mut put = |key: &str, value: Value| drop(map.insert(key.into(), value));
        if let Some((size, filter)) = self.resize {
            put(
                "size",
                match size {
                    Size::Exact(size) => sides(size),
                    Size::Shortest(side) => json!({"shortest_edge": side}),
                },
            );
            put("resample", json!(filter as u64));
        }
        if let Some(crop) = self.crop {
            put("crop_size", sides(crop));
        }
        if let Some(factor) = self.rescale {
            put("rescale_factor", json!(factor));
        }
        if let Some([mean, std]) = self.normalise {
            put("image_mean", json!(mean));
            put("image_std", json!(std));
        }
        format!("{:#}\n", Value::Object(map))
    }

    /// A picture of the size that the model sees.
    pub fn sized(&self, picture: &Picture) -> Picture {
        let resized = match self.resize {
            None => picture.clone(),
            Some((size, filter)) => {
                let [height, width] = size.of(picture);
                resized(picture, width, height, filter)
            }
        };
        match self.crop {
            None => resized,
            Some([height, width]) => resized.centre(width, height),
        }
    }

    /// Pixels `[3, height, width]` of a picture that has its final size.
    pub fn values(&self, picture: &Picture) -> Vec<f32> {
        let colour = |colour: usize| {
            picture.pixels.iter().skip(colour).step_by(3).map(move |byte| {
                let value = f64::from(*byte);
                let value = self.rescale.map_or(value, |factor| value * factor) as f32;
                match self.normalise {
                    None => value,
                    Some([mean, std]) => (value - mean[colour] as f32) / std[colour] as f32,
                }
            })
        };
        (0..3).flat_map(colour).collect()
    }

    /// Pixels `[pictures, 3, height, width]`; all pictures must come to the same size.
    pub fn batch(&self, pictures: &[Picture]) -> Vec<f32> {
        let each: Vec<Vec<f32>> = pictures.par_iter().map(|picture| self.values(&self.sized(picture))).collect();
        each.concat()
    }

    /// Side of the square that every picture comes to; a problem where pictures come to different sizes or shapes.
    pub fn side(&self) -> Result<usize, String> {
        let shape = match (self.crop, self.resize) {
            (Some(shape), _) | (None, Some((Size::Exact(shape), _))) => shape,
            _ => return Err("pictures of different shapes would come to different sizes; it needs do_center_crop, or a size with height and width".into()),
        };
        match shape {
            [height, width] if height == width => Ok(height),
            [height, width] => Err(format!("pictures come to {width} x {height} pixels; the model needs squares")),
        }
    }
}

impl Size {
    /// Height and width of a picture of this size.
    fn of(self, picture: &Picture) -> [usize; 2] {
        match self {
            Self::Exact(size) => size,
            Self::Shortest(side) => {
                let (short, long) = (picture.width.min(picture.height), picture.width.max(picture.height));
                // As Python rounds: the quotient of the whole product, downwards.
                let other = side * long / short;
                if picture.width <= picture.height { [other, side] } else { [side, other] }
            }
        }
    }
}

/// Largest side of a picture that the model sees.
const LARGEST: u64 = 1 << 13;

/// A size in one of its spellings; a single number is a square, or with `shortest` the shorter side.
fn target(value: &Value, shortest: bool) -> Result<Size, String> {
    let side = |value: &Value| value.as_u64().filter(|side| (1..=LARGEST).contains(side)).map(|side| side as usize);
    let found = match value {
        Value::Object(map) if map.len() == 1 && map.contains_key("shortest_edge") => {
            side(&value["shortest_edge"]).map(Size::Shortest)
        }
        Value::Object(map) if map.len() == 2 && map.contains_key("height") && map.contains_key("width") => {
            side(&value["height"]).zip(side(&value["width"])).map(|(height, width)| Size::Exact([height, width]))
        }
        Value::Number(_) => {
            side(value).map(|side| if shortest { Size::Shortest(side) } else { Size::Exact([side; 2]) })
        }
        _ => None,
    };
    found.ok_or_else(|| {
        format!(
            "size is {value}; height and width, shortest_edge, or one number, each from 1 to {LARGEST}, are supported"
        )
    })
}

/// A number for each colour, or one for all.
fn colours(value: &Value) -> Option<[f64; 3]> {
    match value {
        Value::Array(values) => {
            let values: Option<Vec<f64>> = values.iter().map(Value::as_f64).collect();
            values?.try_into().ok()
        }
        value => value.as_f64().map(|value| [value; 3]),
    }
}

fn is_kind(name: &str, kind: &str) -> bool {
    let ends = ["ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor"];
    name.strip_prefix(kind).is_some_and(|end| ends.contains(&end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_spellings_mean_the_same_and_are_read_back() {
        let old = ImageSettings::parse(
            r#"{"feature_extractor_type": "CLIPFeatureExtractor", "size": 12, "crop_size": 12, "resample": 3}"#,
        );
        let new = ImageSettings::parse(
            r#"{"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}"#,
        );
        let old = old.unwrap();
        assert_eq!(old, new.unwrap());
        assert_eq!((old.resize, old.crop), (Some((Size::Shortest(12), Filter::Bicubic)), Some([12, 12])));
        assert_eq!(ImageSettings::parse(&old.to_json()).unwrap(), old);
        let vit = ImageSettings::parse(r#"{"image_processor_type": "ViTImageProcessorFast", "size": 32}"#).unwrap();
        assert_eq!(vit, ImageSettings::vit(32));
        assert_eq!(ImageSettings::parse(&vit.to_json()).unwrap(), vit);
        assert_eq!((vit.side(), old.side()), (Ok(32), Ok(12)));
    }

    #[test]
    fn what_is_not_supported_is_refused_by_its_key() {
        let of = |more: &str| format!(r#"{{"image_processor_type": "ViTImageProcessor", {more}}}"#);
        for (text, part) in [
            ("[]".to_string(), "object"),
            ("{}".to_string(), "image_processor_type"),
            (r#"{"image_processor_type": "SwinImageProcessor"}"#.into(), "SwinImageProcessor"),
            (of(r#""size": {"longest_edge": 3}"#), "size"),
            (of(r#""size": 0"#), "size"),
            (of(r#""size": 1e9"#), "size"),
            (of(r#""resample": 9"#), "resample"),
            (of(r#""image_mean": [1, 2]"#), "image_mean"),
            (of(r#""image_std": [0, 1, 1]"#), "image_std"),
            (of(r#""do_resize": 1"#), "do_resize"),
            (of(r#""do_pad": true"#), "do_pad"),
            (of(r#""rescale_factor": "x""#), "rescale_factor"),
        ] {
            let reason = ImageSettings::parse(&text).unwrap_err();
            assert!(reason.contains(part), "{text}: {reason}");
        }
        let free = ImageSettings { crop: None, ..ImageSettings::parse(&of(r#""do_resize": false"#)).unwrap() };
        assert!(free.side().is_err());
    }
}
