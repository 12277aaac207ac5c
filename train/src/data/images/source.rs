//! Sets of images: folders of classes, JSON lines and IDX files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use walkdir::WalkDir;

use super::decode::decode;
use super::error::ImageError;
use super::idx::{IdxImages, is_idx};
use super::picture::Picture;
use crate::data::DataError;
use crate::data::json_lines::JsonLines;

/// An image that has not been decoded.
#[derive(Clone, Debug)]
pub struct ImageItem {
    place: ImagePlace,
    /// Name of its class, if it has one.
    pub label: Option<String>,
    /// Name of its domain, if it has one.
    pub domain: Option<String>,
}

#[derive(Clone, Debug)]
enum ImagePlace {
    File(PathBuf),
    Idx(PathBuf, Arc<IdxImages>, usize),
}

impl ImageItem {
    /// Its file, with a number where the file holds several images.
    pub fn name(&self) -> String {
        match &self.place {
            ImagePlace::File(path) => path.display().to_string(),
            ImagePlace::Idx(path, _, number) => format!("{} image {number}", path.display()),
        }
    }

    /// Decodes it.
    pub fn picture(&self) -> Result<Picture, DataError> {
        match &self.place {
            ImagePlace::Idx(_, images, number) => Ok(images.picture(*number)),
            ImagePlace::File(path) => {
                let bytes = std::fs::read(path).map_err(DataError::read(path))?;
                decode(&bytes).map_err(|problem| ImageError::Broken { name: self.name(), problem }.into())
            }
        }
    }
}

/// Images of files and folders, in the order of their names.
pub fn items(paths: &[PathBuf]) -> Result<Vec<ImageItem>, DataError> {
    if paths.is_empty() {
        return Err(DataError::NoPath);
    }
    let mut items = Vec::new();
    for path in paths {
        let kind = std::fs::metadata(path).map_err(DataError::read(path))?;
        match kind.is_dir() {
            true => folder(path, &mut items)?,
            false if is_idx(path) => idx(path, &mut items)?,
            false if is_picture(path) => {
                items.push(ImageItem { place: ImagePlace::File(path.clone()), label: None, domain: None })
            }
            false => lines(path, &mut items)?,
        }
    }
    match items.is_empty() {
        false => Ok(items),
        true => Err(ImageError::Empty {
            paths: paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "),
        }
        .into()),
    }
}

fn is_picture(path: &Path) -> bool {
    let end = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    ["png", "jpg", "jpeg"].contains(&end.as_str())
}

/// `DIR/class/*`, or the IDX files in a folder. Hidden files are left out.
fn folder(dir: &Path, items: &mut Vec<ImageItem>) -> Result<(), DataError> {
    let set = |path: &Path, problem: &str| ImageError::Set { path: path.to_path_buf(), problem: problem.into() };
    let hidden = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with('.');
    let walk = WalkDir::new(dir).sort_by_file_name().follow_links(true);
    for entry in walk.into_iter().filter_entry(|entry| entry.depth() == 0 || !hidden(entry.file_name())) {
        let entry = entry.map_err(|error| DataError::Read { path: dir.to_path_buf(), source: error.into() })?;
        let (path, depth) = (entry.path(), entry.depth());
        if entry.file_type().is_dir() {
            if depth > 1 {
                return Err(set(path, "a folder of a class holds images and no folders; move them up").into());
            }
            continue;
        }
        match depth {
            1 if is_idx(path) => idx(path, items)?,
            // Labels are read with their images.
            1 if path.to_string_lossy().contains("idx1-ubyte") => {}
            2 if is_picture(path) => {
                let class = path.parent().and_then(Path::file_name).unwrap_or_default();
                let label = Some(class.to_string_lossy().into_owned());
                items.push(ImageItem { place: ImagePlace::File(path.to_path_buf()), label, domain: None });
            }
            1 => return Err(set(path, "lies beside the folders of the classes; move it into one, or away").into()),
            _ => return Err(set(path, "is no .png, .jpg or .jpeg file; move it away").into()),
        }
    }
    Ok(())
}

fn idx(path: &Path, items: &mut Vec<ImageItem>) -> Result<(), DataError> {
    let images = Arc::new(IdxImages::read(path)?);
    for (number, label) in images.labels.iter().enumerate() {
        let place = ImagePlace::Idx(path.to_path_buf(), images.clone(), number);
        items.push(ImageItem { place, label: Some(label.to_string()), domain: None });
    }
    Ok(())
}

/// `{"image": .., "label": .., "domain": ..}`, with paths relative to the file.
fn lines(path: &Path, items: &mut Vec<ImageItem>) -> Result<(), DataError> {
    let mut lines = JsonLines::open(path.to_path_buf())?;
    let base = path.parent().unwrap_or(Path::new(""));
    while let Some((line, value)) = lines.next(|bytes| serde_json::from_slice::<Value>(bytes))? {
        let wrong = |problem: String| DataError::Example { path: path.to_path_buf(), line, problem };
        let Value::Object(map) = value else { return Err(wrong(format!("is {value}; it must be an object"))) };
        if let Some(key) = map.keys().find(|key| !["image", "label", "domain"].contains(&key.as_str())) {
            return Err(wrong(format!("has the key {key}; image, label and domain are known")));
        }
        let word = |key: &str| match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(word)) if !word.is_empty() => Ok(Some(word.clone())),
            Some(Value::Number(number)) if number.is_u64() => Ok(Some(number.to_string())),
            Some(other) => Err(wrong(format!("{key} is {other}; it must be a text or a whole number"))),
        };
        let image = match map.get("image") {
            Some(Value::String(image)) => base.join(image),
            other => {
                let other = other.cloned().unwrap_or_default();
                return Err(wrong(format!("image is {other}; it must be the path of a PNG or JPEG file")));
            }
        };
        items.push(ImageItem { place: ImagePlace::File(image), label: word("label")?, domain: word("domain")? });
    }
    Ok(())
}
