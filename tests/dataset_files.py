"""Small data sets in the exact formats of their projects."""

import json

import h5py
import numpy as np
from PIL import Image


# Two images of 200 x 100 and 80 x 160 pixels; boxes x1, y1, x2, y2; classes of NAMES.
NAMES, PREDICATES = ["cup", "hand", "table"], ["holding", "on"]
SIZES = [(200, 100), (80, 160)]
BOXES = [
    [[10, 20, 50, 60], [30, 30, 90, 80], [0, 50, 200, 100]],
    [[8, 16, 40, 80], [0, 0, 80, 160]],
]
LABELS = [[0, 1, 2], [0, 2]]
RELATIONS = [[[1, 0, 0], [0, 2, 1]], [[0, 1, 1]]]


def write_images(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in zip(names, SIZES, strict=True):
        pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco_images(names):
    return [
        {"id": 10 + row, "file_name": name, "width": width, "height": height}
        for row, (name, (width, height)) in enumerate(zip(names, SIZES, strict=True))
    ]


def coco_annotations(first_category):
    annotations = []
    for row, (boxes, labels) in enumerate(zip(BOXES, LABELS, strict=True)):
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            annotations.append(
                {
                    "id": 100 + len(annotations), "image_id": 10 + row,
                    "category_id": label + first_category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0, "segmentation": None,
                }
            )  # fmt: skip
    return annotations


def write_coco_rel(folder):
    write_images(folder, ["a.jpg", "b.jpg"])
    categories = [{"id": i + 1, "name": name, "supercategory": ""} for i, name in enumerate(NAMES)]
    for split in ("train", "val"):
        write_json(
            folder / f"{split}.json",
            {"images": coco_images(["a.jpg", "b.jpg"]), "annotations": coco_annotations(1),
             "categories": categories},
        )  # fmt: skip
    relations = {
        str(10 + row): [[s, o, p + 1] for s, o, p in rows] for row, rows in enumerate(RELATIONS)
    }
    # In another order than the images.
    relations = dict(reversed(relations.items()))
    names = ["__background__", *PREDICATES]
    write_json(folder / "rel.json", {"train": relations, "val": relations, "rel_categories": names})
    return folder


def write_coco_rel_annotations(folder, base, split="train", background=False):
    write_images(folder / split, ["a.jpg", "b.jpg"])
    starts = [0, len(BOXES[0])]
    relations = [
        {
            "image_id": 10 + row, "subject_id": 100 + starts[row] + s,
            "object_id": 100 + starts[row] + o, "predicate_id": p + base,
        }
        for row, rows in enumerate(RELATIONS)
        for s, o, p in rows
    ]  # fmt: skip
    extra = [{"id": 0, "name": "__background__"}] if background else []
    write_json(
        folder / split / "_annotations.coco.json",
        {
            "images": coco_images(["a.jpg", "b.jpg"]),
            "annotations": coco_annotations(base),
            "categories": extra + [{"id": i + base, "name": n} for i, n in enumerate(NAMES)],
            "rel_categories": extra
            + [{"id": i + base, "name": n} for i, n in enumerate(PREDICATES)],
            "rel_annotations": [row | {"id": i} for i, row in enumerate(relations)],
        },
    )
    return folder


def write_psg(folder):
    write_images(folder, ["train2017/a.jpg", "val2017/b.jpg"])
    data = []
    for row, name in enumerate(["train2017/a", "val2017/b"]):
        width, height = SIZES[row]
        ids = np.zeros((height, width), dtype=np.int64)
        segments = []
        for number, (x1, y1, x2, y2) in enumerate(BOXES[row], start=1):
            # Ids use all three channels.
            segment = number * 70000
            ids[y1:y2, x1:x2] = segment
            segments.append({"id": segment, "category_id": LABELS[row][number - 1], "iscrowd": 0})
        colors = np.stack((ids % 256, ids // 256 % 256, ids // 65536), axis=-1).astype(np.uint8)
        panoptic = folder / f"panoptic_{name}.png"
        panoptic.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colors).save(panoptic)
        data.append(
            {
                "file_name": f"{name}.jpg", "height": height, "width": width,
                "image_id": f"id{row}", "pan_seg_file_name": f"panoptic_{name}.png",
                "segments_info": segments,
                "annotations": [
                    {"bbox": box, "bbox_mode": 0, "category_id": label}
                    for box, label in zip(BOXES[row], LABELS[row], strict=True)
                ],
                # The first triplet twice.
                "relations": RELATIONS[row][:1] + RELATIONS[row],
            }
        )  # fmt: skip
    content = {
        "data": data, "test_image_ids": ["id1"], "thing_classes": NAMES[:2],
        "stuff_classes": NAMES[2:], "predicate_classes": PREDICATES,
    }  # fmt: skip
    return write_json(folder / "psg.json", content)


def write_open_images(folder):
    write_images(folder / "images", ["a.jpg", "b.jpg"])
    entries = [
        {"img_fn": name, "img_size": list(SIZES[row]), "bbox": BOXES[row],
         "det_labels": LABELS[row], "rel": RELATIONS[row]}
        for row, name in enumerate("ab")
    ]  # fmt: skip
    write_json(folder / "annotations" / "vrd-train-anno.json", entries)
    write_json(folder / "annotations" / "categories_dict.json", {"obj": NAMES, "rel": PREDICATES})
    return folder


def write_vg150(folder, num_images=6):
    """Images 1591 to 1597 without 1592; the boxes are those of BOXES[0] at a scale of 1024."""
    scale = 1024 / 200
    rows = np.array(BOXES[0], dtype=np.float64) * scale
    centres = (rows[:, :2] + rows[:, 2:]) / 2
    stored = np.concatenate((centres, rows[:, 2:] - rows[:, :2]), axis=1).round().astype(np.int32)
    listed = [
        {"image_id": 1591 + i, "width": 200, "height": 100, "url": "", "coco_id": None}
        for i in range(num_images + 1)
    ]
    write_json(folder / "image_data.json", listed)
    number = np.arange(num_images, dtype=np.int32)
    relations = np.array(RELATIONS[0])
    # The second image has no relation, the third nothing at all.
    has_boxes, has_relations = number != 2, (number != 1) & (number != 2)
    first_box = np.where(has_boxes, np.cumsum(has_boxes) * 3 - 3, -1)
    first_relation = np.where(has_relations, np.cumsum(has_relations) * 2 - 2, -1)
    with h5py.File(folder / "VG-SGG-with-attri.h5", "w") as file:
        file["labels"] = np.tile(np.array(LABELS[0]) + 1, has_boxes.sum())[:, None]
        file["boxes_1024"] = np.tile(stored, (has_boxes.sum(), 1))
        file["attributes"] = np.tile([[2, 0], [0, 0], [1, 2]], (has_boxes.sum(), 1))
        file["img_to_first_box"], file["img_to_last_box"] = (
            first_box, np.where(has_boxes, first_box + 2, -1),
        )  # fmt: skip
        file["img_to_first_rel"], file["img_to_last_rel"] = (
            first_relation, np.where(has_relations, first_relation + 1, -1),
        )  # fmt: skip
        file["predicates"] = np.tile(relations[:, 2] + 1, has_relations.sum())[:, None]
        # Rows of all objects of the file.
        file["relationships"] = np.concatenate(
            [relations[:, :2] + first for first in first_box[has_relations]]
        )
        file["split"] = np.where(number == num_images - 1, 2, 0)
    names = {str(i + 1): name for i, name in enumerate(NAMES)}
    predicates = {str(i + 1): name for i, name in enumerate(PREDICATES)}
    write_json(
        folder / "VG-SGG-dicts-with-attri.json",
        {"idx_to_label": names, "idx_to_predicate": predicates,
         "idx_to_attribute": {"2": "red", "1": "big"}},
    )  # fmt: skip
    return folder


def write_open_images_csv(folder):
    """Relations alone; entities come in the order in which relations name them."""
    write_images(folder / "images", ["a.jpg", "b.jpg"])
    codes = ["/m/c", "/m/h", "/m/t"]
    named = "".join(f"{code},{name}\n" for code, name in zip(codes, NAMES, strict=True))
    (folder / "oidv6-class-descriptions.csv").write_text("LabelName,DisplayName\n" + named)
    lines = ["ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,"
             "RelationshipLabel"]  # fmt: skip
    for row, name in enumerate("ab"):
        width, height = SIZES[row]
        for subject, object_, predicate in RELATIONS[row]:
            fields = [codes[LABELS[row][end]] for end in (subject, object_)]
            for end in (subject, object_):
                x1, y1, x2, y2 = BOXES[row][end]
                fields += [x1 / width, x2 / width, y1 / height, y2 / height]
            lines.append(",".join(map(str, [name, *fields, PREDICATES[predicate]])))
    # An attribute, which is not a relation.
    lines.append("b,/m/c,/m/Wooden,0.1,0.5,0.1,0.5,0.1,0.5,0.1,0.5,is")
    path = folder / "oidv6-train-annotations-vrd.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_visual_genome(folder, whole=True):
    """One image with names beyond the vocabulary, aliases, and an entity that a relation brings."""
    entities = [
        {"object_id": 7, "x": 10, "y": 20, "w": 40, "h": 40, "names": ["Mug."], "synsets": [],
         "attributes": ["Red ", "shiny"]},
        {"object_id": 8, "x": 30, "y": 30, "w": 60, "h": 50, "names": ["hand"], "synsets": []},
        {"object_id": 9, "x": 0, "y": 0, "w": 5, "h": 5, "names": ["dragon"], "synsets": []},
    ]  # fmt: skip
    table = {"object_id": 5, "x": 0, "y": 50, "w": 200, "h": 50, "name": "table", "synsets": []}
    relations = [("Holds", entities[1], entities[0]), ("on", entities[0], table),
                 ("eats", entities[2], entities[0])]  # fmt: skip
    write_json(folder / "image_data.json", [{"image_id": 1, "width": 200, "height": 100}])
    if whole:
        rows = [
            {"predicate": p, "subject_id": s["object_id"], "object_id": o["object_id"]}
            for p, s, o in relations
        ]
        graph = {"image_id": 1, "objects": [*entities, table], "relationships": rows}
        write_json(folder / "scene_graphs.json", [graph])
    else:
        rows = [{"predicate": p, "subject": s, "object": o} for p, s, o in relations]
        write_json(folder / "objects.json", [{"image_id": 1, "objects": entities}])
        write_json(folder / "relationships.json", [{"image_id": 1, "relationships": rows}])
    (folder / "object_alias.txt").write_text("cup,mug,beaker\n")
    (folder / "relationship_alias.txt").write_text("holding,holds\n")
    return folder


def gqa_graph():
    names = {"1001": "cup", "1002": "hand", "1003": "table"}
    objects = {}
    for row, (number, name) in enumerate(names.items()):
        x1, y1, x2, y2 = BOXES[0][row]
        objects[number] = {
            "name": name, "x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1, "attributes": ["red"],
            "relations": [],
        }  # fmt: skip
    objects["1001"]["relations"] = [{"name": "on", "object": "1003"}]
    objects["1002"]["relations"] = [{"name": "holding", "object": "1001"}]
    return {"n161313": {"width": 200, "height": 100, "objects": objects}}


def gqa200_columns():
    return {
        "filenames_all": ["x/a.jpg", "x/b.jpg"],
        "img_info_all": [{"width": w, "height": h} for w, h in SIZES],
        "gt_boxes_all": BOXES,
        "gt_classes_all": [[label + 1 for label in labels] for labels in LABELS],
        "relationships_all": [[[s, o, p + 1] for s, o, p in rows] for rows in RELATIONS],
    }


def write_gqa200(folder):
    write_json(
        folder / "GQA_200_ID_Info.json",
        {"ind_to_classes": ["__background__", *NAMES],
         "ind_to_predicates": ["__background__", *PREDICATES]},
    )  # fmt: skip
    write_images(folder, ["a.jpg", "b.jpg"])
    for part in ("Train", "Test"):
        write_json(folder / f"GQA_200_{part}.json", gqa200_columns())
    return folder


def coco_rows(folder):
    """The rows of a Hub data set with COCO columns, made of a folder of SGG-Benchmark."""
    entries = json.loads((folder / "train" / "_annotations.coco.json").read_text())
    columns = {
        "objects": ("annotations", ("id", "category_id", "bbox", "area", "iscrowd")),
        "relations": ("rel_annotations", ("id", "subject_id", "object_id", "predicate_id")),
    }
    rows = []
    for image in entries["images"]:
        row = {"image": str(folder / "train" / image["file_name"]), "image_id": image["id"]}
        row |= {name: image[name] for name in ("width", "height", "file_name")}
        for column, (name, fields) in columns.items():
            of_image = [entry for entry in entries[name] if entry["image_id"] == image["id"]]
            row[column] = [{field: entry[field] for field in fields} for entry in of_image]
        rows.append(row)
    return rows, {name: entries[name] for name in ("categories", "rel_categories")}
