// A form forgets in which folder each file of a chosen folder lies: say it beside the files, one path a line, in their order.
const input = document.querySelector("input[type=file][webkitdirectory]");
const paths = document.querySelector("input[name=paths]");
const tell = () => { paths.value = [...input.files].map((file) => file.webkitRelativePath || file.name).join("\n"); };
input?.addEventListener("change", tell);
input?.form.addEventListener("submit", tell);

// What is larger than the server takes is said here, before hours of sending; the server refuses it as well.
const form = paths?.form;
const fault = document.getElementById("too-large");
const check = () => {
  const where = form.querySelector("input[name=where]:checked")?.value;
  const chosen = form.querySelector({ upload: "input[name=files]", folder: "input[name=tree]" }[where] ?? "input[name=none]");
  const size = [...(chosen?.files ?? [])].reduce((sum, file) => sum + file.size, 0);
  fault.hidden = size <= Number(form.dataset.limit);
  return fault.hidden;
};
form?.addEventListener("change", check);
form?.addEventListener("submit", (event) => { if (!check()) { event.preventDefault(); fault.scrollIntoView({ block: "center" }); } });
