// Window presets, in HU, as radiologists name them: level (centre) and width.

export const WINDOWS = [
  { key: "1", name: "Soft tissue", short: "Soft", level: 40, width: 400 },
  { key: "2", name: "Lung", short: "Lung", level: -600, width: 1500 },
  { key: "3", name: "Mediastinum", short: "Medi", level: 50, width: 350 },
  { key: "4", name: "Bone", short: "Bone", level: 400, width: 1800 },
  { key: "5", name: "Brain", short: "Brain", level: 40, width: 80 },
  { key: "6", name: "Liver", short: "Liver", level: 60, width: 150 },
  { key: "7", name: "CT angiography", short: "Angio", level: 300, width: 600 },
];

export const WHOLE = { key: "0", name: "Whole range", short: "All" };

export function range({ level, width }) {
  return [level - width / 2, level + width / 2];
}

export function levelWidth(low, high) {
  return { level: (low + high) / 2, width: high - low };
}

/** The preset with these limits, if there is one. */
export function named(low, high) {
  return WINDOWS.find((preset) => range(preset).every((value, i) => Math.abs(value - [low, high][i]) < 1));
}
