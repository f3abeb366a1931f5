// A form forgets in which folder each file of a chosen folder lies: say it beside the files, one path a line, in their order.
const input = document.querySelector("input[type=file][webkitdirectory]");
const paths = document.querySelector("input[name=paths]");
const tell = () => { paths.value = [...input.files].map((file) => file.webkitRelativePath || file.name).join("\n"); };
input?.addEventListener("change", tell);
input?.form.addEventListener("submit", tell);
